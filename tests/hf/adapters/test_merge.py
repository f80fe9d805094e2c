"""Merging writes another store: the adapters are in its codes, the rest is as it was, and the report says the cost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tersor import store
from tersor.errors import CorruptStoreError, ModelError
from tersor.hf import merge
from tersor.hf.compress.request import Sampling
from tersor.hf.compress.verify import verify
from tersor.testing import digest
from tests.hf.adapters.conftest import IDS, LOAD, drawn

pytestmark = pytest.mark.usefixtures("read_back_here")
FAST = {"evaluation_tokens": 0}
LOSSLESS = {"method": "rtn8g64", "rate": 12.0}
SAMPLING = Sampling(tokens=512, fisher_tokens=64, context=64)


def tuned(model: Any, targets: Any = ("q_proj", "down_proj"), **given: Any) -> Any:
    chosen = targets if isinstance(targets, str) else list(targets)
    made = get_peft_model(model, LoraConfig(r=4, target_modules=chosen, task_type="CAUSAL_LM", **given)).eval()
    drawn(made, 0.1)
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_output_computes_what_the_adapters_did(name: str, load: LOAD, tmp_path: Path) -> None:
    """With fine codes nothing is lost but their rounding."""
    targets = "all-linear" if name == "gpt2" else ("q_proj", "down_proj", "lm_head", "embed_tokens")
    model = tuned(load(name, **LOSSLESS), targets)
    before = logits(model)
    report = merge(model, tmp_path / "out", **FAST)
    assert torch.equal(logits(model), before)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with model.disable_adapter():
        plain = logits(model)
    assert float((logits(found) - before).norm()) < 0.03 * float((plain - before).norm())
    assert report["merge"]["adapter_kept"] == pytest.approx(1, abs=0.01)
    assert report["merge"]["adapter_error"] < 0.05
    assert report["merge"]["adapters"] == ["default"]
    assert verify(tmp_path / "out")["matrices"] == len(report["matrices"])
    assert not (tmp_path / "out.work").exists()


def test_what_has_no_adapter_keeps_its_bytes(load: LOAD, tmp_path: Path) -> None:
    model = tuned(load())
    report = merge(model, tmp_path / "out", **FAST)
    old, new = store.read(Path(model.get_base_model().config.name_or_path)), store.read(tmp_path / "out")
    changed = {name for name in old.matrix_names()
               if digest(old.matrix(name).tensors) != digest(new.matrix(name).tensors)}
    assert changed == {name for name in old.matrix_names() if "q_proj" in name or "down_proj" in name}
    assert {n: e.codec for n, e in old.entries.items()} == {n: e.codec for n, e in new.entries.items()}
    assert report["merge"]["matrices"] == len(changed) == 4
    assert 0 < report["merge"]["adapter_kept"] < 1.2
    assert json.loads((tmp_path / "out" / "tersor-report.json").read_text())["merge"] == report["merge"]
    assert new.manifest["provenance"]["merged"]["store"] == old.manifest["sha256"]


def test_calibrated_stores_are_calibrated_again_and_the_cost_is_told(
        compressed: Callable[..., tuple[Path, Path]], load: LOAD, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    settings = {"calibrated": True, "calibration": text, "sampling": SAMPLING}
    model = tuned(load(**settings))
    report = merge(model, tmp_path / "out", calibration=text, text=text, sampling=SAMPLING, evaluation_tokens=256,
                   context=64)
    assert report["merge"]["kl"] > 0
    assert report["matrices"]["model.layers.0.self_attn.q_proj.weight"]["options"]["feedback"] is True
    assert report["provenance"]["calibration"]["source"].startswith("text.txt")


def test_trained_biases_go_along(load: LOAD, tmp_path: Path) -> None:
    model = tuned(load("gpt2", **LOSSLESS), "all-linear", bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ln_1.bias"):
                parameter.add_(0.5)
    before = logits(model)
    merge(model, tmp_path / "out", **FAST)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert float((logits(found) - before).norm()) < 0.02 * float(before.norm())


@pytest.mark.parametrize(("targets", "given", "said"), [
    (("q_proj",), {"use_dora": True}, "more than a product of two factors"),
    (("q_proj",), {"modules_to_save": ["lm_head"]}, "was trained whole"),
])
def test_what_cannot_be_merged_is_named(targets: Any, given: dict[str, Any], said: str, load: LOAD,
                                        tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        merge(tuned(load(), targets, **given), tmp_path / "out", **FAST)
    assert not any(tmp_path.iterdir())


def test_refusals_leave_nothing_behind(load: LOAD, tmp_path: Path) -> None:
    for model, settings, said in ((load(), {}, "no active adapters"), (nn.Linear(2, 2), {}, "expected a transformers"),
                                  (tuned(load()), {"adapters": ("other",)}, "no adapters.*other"),
                                  (tuned(load("llama_tied"), ("embed_tokens",)), {}, "share one weight")):
        with pytest.raises(ModelError, match=said):
            merge(model, tmp_path / "out", **FAST, **settings)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        merge(tuned(load()), tmp_path / "out", **FAST)
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_a_store_that_has_changed_is_not_merged(load: LOAD, tmp_path: Path) -> None:
    model = tuned(load())
    quantizer = model.get_base_model().hf_quantizer
    quantizer.loaded = quantizer.loaded[0], "0" * 64
    with pytest.raises(CorruptStoreError, match="has changed"):
        merge(model, tmp_path / "out", **FAST)
