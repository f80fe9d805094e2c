"""Every sort of checkpoint goes through all stages: calibrated, compressed, verified and evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tersor.hf.compress.request import Sampling
from tersor.hf.compress.run import compress_model
from tersor.hf.models.source import open_source
from tests.hf.models import test_gguf_file as gguf_files
from tests.hf.models.test_mapping import save
from tests.hf.models.test_quantized import blocks, deepseek, gpt_oss, quantize
from tests.hf.tiny import save_tiny, save_tokenizer

pytestmark = [pytest.mark.usefixtures("read_back_here"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def made(sort: str, folder: Path) -> Path:
    """Write a checkpoint with a vocabulary of 128, and a tokenizer."""
    if sort == "gguf":
        return gguf_files.write(save_tiny("llama", folder / "src"), folder / "m.gguf", kinds=gguf_files.KINDS)
    model = folder / "m"
    if sort == "mxfp4":
        gpt_oss(model)
    elif sort == "deepseek":
        save("deepseek_v3", model)
    elif sort == "pickled":
        pickle(save_tiny("mixtral", model))
    else:
        quantize(save_tiny(sort, folder / "src", torch.bfloat16), model, deepseek((32, 48)), "_scale_inv",
                 blocks((32, 48)))
    save_tokenizer(model)
    return model


def pickle(folder: Path) -> None:
    """Turn a model's safetensors into a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("sort", ["llama", "qwen3_moe", "gguf", "mxfp4", "deepseek", "pickled"])
def test_all_stages(sort: str, tmp_path: Path) -> None:
    """The first two are of eight-bit floats."""
    model = made(sort, tmp_path)
    source = open_source(model, tmp_path / "s")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    bits = {"size": source.original_nbytes - 1} if sort in ("llama", "qwen3_moe", "mxfp4") else {"rate": 20}
    report = compress_model(model, tmp_path / "out", **bits, method="rtn4", evaluation_tokens=64, context=32, text=text,
                            calibration=text, sampling=Sampling(tokens=128, fisher_tokens=64, context=32))
    assert 0 < report["evaluation"]["kl"] < 0.05
    assert report["summary"]["bytes_original"] == source.original_nbytes
    assert set(report["ledger"]) == set(source.ledger.lines)
