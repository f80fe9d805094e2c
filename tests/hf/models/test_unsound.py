"""Checkpoints that no one should have to debug: custom code, odd configurations, pickles that are none, foreign ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tersor.errors import CorruptStoreError, ModelError, VerificationError
from tersor.hf.compress.verify import verify
from tersor.hf.models import matrices
from tersor.hf.models.dense import write_dense
from tersor.hf.models.source import open_source
from tersor.hf.models.text import check_vocabulary
from tersor.store import read
from tests.hostile import kinds
from tests.hostile.mutations import sign_store

Tiny = Callable[[str], Path]


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def refusal(model: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_source(model, model.parent / "staged")
    return str(caught.value)


def configure(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("changes", [
    {"hidden_size": "32"}, {"hidden_size": None}, {"hidden_size": -64}, {"architectures": {"a": 1}},
    {"architectures": "x"}, {"vocab_size": 2**40}, {"num_attention_heads": 0}, {"model_type": 5},
    {"hidden_act": "none such"}, {"quantization_config": 5}, {"pad_token_id": 10**9}], ids=str)
def test_odd_configurations(model: Path, changes: dict[str, Any]) -> None:
    configure(model, **changes)
    assert refusal(model)


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_experts", "n_routed_experts", "decoder_layers"])
def test_a_model_of_a_million_layers_is_refused_before_it_is_built(model: Path, field: str) -> None:
    configure(model, **{field: 10**6})
    assert f"{field}: 1000000; at most {matrices.MOST_PARTS}" in refusal(model)


def test_custom_code_is_neither_run_nor_asked_about(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "configuration_x.py").write_text("raise SystemExit('custom code ran')\n")
    configure(model, model_type="xmodel", auto_map={"AutoConfig": "configuration_x.XConfig"})
    assert "custom code" in refusal(model) or "trust_remote_code" in refusal(model)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", b"no pickle", b"\x80\x02N.", b"PK\x03\x04", b"\x80\x02]q\x00.", bytes(300)])
def test_pickles_that_are_none(model: Path, data: bytes) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(data)
    assert refusal(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_norms_of_dtypes_that_a_store_lacks(model: Path, dtype: torch.dtype) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in refusal(model)


def test_ids_beyond_the_embedding_are_refused() -> None:
    config = AutoConfig.for_model("llama", vocab_size=512)
    check_vocabulary(config, 511, "it")
    with pytest.raises(ModelError, match="tokenizer makes the token id 512, but the embedding has 512 rows"):
        check_vocabulary(config, 512, "it")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    kinds.EVERY["dense"].make(folder)
    return folder / "store"


@pytest.mark.parametrize("report", [b"\xff\xfe\0", b"[]", b"{}", b'{"matrices": 5}', b'{"matrices": {"a": 5}}',
                                    b"[" * 100_000, b'{"matrices": {"a": {"relative_error": "x"}}}'])
def test_reports_that_are_none(compressed: Path, tmp_path: Path, report: bytes) -> None:
    store = Path(shutil.copytree(compressed, tmp_path / "store"))
    (store / "tersor-report.json").write_bytes(report)
    with pytest.raises(CorruptStoreError, match="damaged report"):
        verify(store)


@pytest.mark.parametrize("error", [1e400, "Infinity", None, -1.0])
def test_a_report_cannot_promise_any_error(tmp_path: Path, error: Any) -> None:
    kinds.EVERY["dense"].make(tmp_path)
    kinds._checkpoint(tmp_path)
    store, file = tmp_path / "store", tmp_path / "store" / "tersor-report.json"
    source = open_source(tmp_path / "model", tmp_path / "staged")
    assert verify(store, source)["matrices"]
    record = json.loads(file.read_text())
    for line in record["matrices"].values():
        line["relative_error"] = error
    file.write_text(json.dumps(record))
    with pytest.raises((CorruptStoreError, VerificationError)):
        verify(store, source)


def test_a_store_that_decodes_beyond_the_original_dtype_is_refused(compressed: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(compressed, tmp_path / "store"))
    manifest = json.loads((store / "tersor.json").read_bytes())
    name = next(name for name, record in manifest["matrices"].items()
                if manifest["codecs"][record["codec"]]["id"] == "dense")
    for file in store.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{name}/values" in tensors:
            tensors[f"{name}/values"].fill_(1e30)
            save_file(tensors, file, {"format": "pt"})
    manifest["matrices"][name]["dtype"] = "float16"
    (store / "tersor.json").write_text(json.dumps(manifest))
    sign_store(store)
    with pytest.raises(CorruptStoreError, match="decodes beyond float16"):
        write_dense(read(store), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
