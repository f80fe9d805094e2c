"""Success is proven: what was written is loaded and run; weights that cannot be encoded stay dense, and are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tersor import nn as tersor_nn
from tersor import store
from tersor.errors import VerificationError
from tersor.hf import compress_model, verify
from tersor.hf.compress.proof import distance, prove
from tersor.hf.models.dense import write_dense
from tersor.hf.models.evaluate import load_compressed
from tests.hf.tiny import load_original

FAST = {"calibrated": False, "evaluation_tokens": 0, "method": "rotated_scalar"}
IDS = torch.arange(9).reshape(1, 9)
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
CLASSES = {  # modules that use their weights in ways of their own
    "falcon": {**SMALL, "num_hidden_layers": 2, "multi_query": True},  # x @ weight.T
    "rwkv": {**SMALL, "num_hidden_layers": 2, "attention_hidden_size": 64, "intermediate_size": 96, "rescale_every": 1},
    "zamba2": {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "n_mamba_heads": 4, "mamba_d_state": 16,
               "mamba_headdim": 32, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1,
               "use_shared_attention_adapter": True, "adapter_rank": 8, "chunk_size": 32},  # shares whole blocks
}


def made(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    config = AutoConfig.for_model(name, **CLASSES[name], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("name", CLASSES)
def test_it_runs_as_its_decoded_weights_do(name: str, tmp_path: Path) -> None:
    report = compress_model(made(name, tmp_path / "m"), tmp_path / "out", 12.0, **FAST)
    write_dense(store.read(tmp_path / "out"), tmp_path / "dense")
    with torch.no_grad():
        ours = load_compressed(tmp_path / "out")(input_ids=IDS, use_cache=False).logits
        theirs = load_original(tmp_path / "dense")(input_ids=IDS, use_cache=False).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-5
    dense = report["left_dense"]
    assert (len(dense) == 4) == (name == "rwkv")
    assert all(name.endswith(("attention.output.weight", "feed_forward.value.weight")) for name in dense)


@pytest.fixture(scope="module")
def out(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proof") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *_: None)
        compress_model(tiny("qwen3_moe"), folder, 9.0, **FAST)
    return folder


def test_the_proof_tells_what_it_did(out: Path) -> None:
    found = verify(out)["proof"]
    assert found["class"] == "Qwen3MoeForCausalLM"
    assert "input_ids" in found["inputs"]
    assert found["relative_error"] <= found["tolerance"] < 1e-4
    assert verify(out, proven=False)["proof"] is None


@pytest.mark.parametrize("fault", ["wrong", "crash"])
def test_a_model_that_computes_something_else_is_refused(fault: str, out: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is as it was written, but the product is off, or cannot be computed."""
    right = tersor_nn.CompressedLinear.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if fault == "crash":
            raise AttributeError("no such thing")
        return 1.01 * right(self, x)

    monkeypatch.setattr(tersor_nn.CompressedLinear, "forward", forward)
    with pytest.raises(VerificationError, match="rounding explains" if fault == "wrong" else "no such thing"):
        prove(out)


def test_what_does_not_load_is_refused(out: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(out, tmp_path / "changed")
    config = json.loads((out / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(VerificationError, match=r"from_pretrained fails: .*config\.json"):
        prove(changed)


def test_distance_knows_infinity_and_shape() -> None:
    one = {"logits": torch.tensor([1.0, float("-inf")])}
    assert distance(one, one) == 0
    assert distance({"logits": torch.tensor([1.0, 2.0])}, one) == float("inf")
    assert distance({"logits": torch.tensor([1.0])}, one) == float("inf")
    assert distance({}, {}) == float("inf")
    assert distance({"logits": torch.tensor([1.5, float("-inf")])}, one) == 0.5
