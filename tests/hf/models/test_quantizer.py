"""Loading by from_pretrained: by a hub's name, with and without its own files; models without any dense parameter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tersor import store
from tersor.hf import compress_model
from tersor.hf.models import quantizer
from tests.hf.tiny import save_tiny

COMMIT = "0" * 40
IDS = torch.arange(7).reshape(1, 7)
FETCHED = ("config.json", "generation_config.json", "model.safetensors")  # what transformers asks for


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *_: None)
        compress_model(save_tiny("llama", folder / "m"), folder / "out", 9.0, method="rotated_scalar",
                       calibrated=False, evaluation_tokens=0)
    return folder / "out"


def cache(out: Path, hub: Path) -> Path:
    """Lay a model out as a hub's cache has it, with the files that transformers fetches, and return their folder."""
    folder = hub / "models--user--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in FETCHED:
        if (out / name).exists():
            shutil.copyfile(out / name, snapshot / name)
    return snapshot


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("reachable", [True, False], ids=["fetched", "offline"])
def test_a_hubs_name_loads(reachable: bool, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it asks for an adapter, with pauses
    snapshot, asked = cache(out, tmp_path), []

    def fetch(name: str, file: str, **where: Any) -> str:
        asked.append((name, file, where["revision"], Path(where["cache_dir"])))
        if not reachable:
            raise OSError("offline")
        shutil.copyfile(out / file, snapshot / file)
        return str(snapshot / file)

    monkeypatch.setattr(quantizer, "cached_file", fetch)
    model = AutoModelForCausalLM.from_pretrained("user/model", cache_dir=tmp_path, local_files_only=True)
    assert asked == [("user/model", store.MANIFEST, COMMIT, tmp_path)]
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(out)))


@pytest.mark.usefixtures("verified_here")
def test_a_model_whose_parameters_are_all_encoded_has_a_dtype(tmp_path: Path) -> None:
    config = AutoConfig.for_model("olmo", hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=64,
                                  num_attention_heads=4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    compress_model(tmp_path / "m", tmp_path / "out", 9.0, method="rotated_scalar", calibrated=False,
                   evaluation_tokens=0)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == torch.float32
    assert not any(told.values())
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 9)
