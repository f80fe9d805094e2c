"""`verify` and `evaluate` on what `tersor gguf` and `tersor compressed-tensors` write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tersor import cli
from tersor.errors import CorruptStoreError, TersorError, VerificationError
from tests.hf.gguf.tiny_gguf import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUICK = ["--uncalibrated", "--evaluation-tokens", "0", "--effort", "fast", "--json"]


def invoke(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(result.exception, TersorError):
        raise result.exception
    assert result.exit_code == 0, repr(result.exception)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("tiny") / "src", torch.bfloat16)


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what both commands write; tests that damage it take a copy."""
    made = tmp_path_factory.mktemp("written")
    invoke("gguf", folder, made / "out.gguf", "--rate", "7", *QUICK)
    invoke("compressed-tensors", folder, made / "out", "--linears", "5", *QUICK)
    return made


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_both_are_verified_and_evaluated(name: str, folder: Path, written: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(written, tmp_path / "copy")) / name
    assert invoke("verify", out, "--json")["against"] is None
    found = invoke("verify", out, "--against", folder, "--json")
    assert 0 < float(str(found["worst_relative_error"])) < 0.1
    figures = invoke("evaluate", out, "--against", folder, "--context", "64", "--tokens", "256", "--json")
    assert 0 < float(str(figures["kl"])) < 0.5
    file = out if out.is_file() else out / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptStoreError, match="SHA-256"):
        invoke("verify", out)
    (out / "tersor-report.json" if out.is_dir() else out.with_name("out.gguf.report.json")).unlink()
    with pytest.raises(CorruptStoreError, match="report"):
        invoke("verify", out)


def test_the_original_must_be_the_one(written: Path, tmp_path: Path) -> None:
    other = save("llama", tmp_path / "other", torch.float32, intermediate_size=512)
    with pytest.raises(VerificationError, match="feed_forward_length"):
        invoke("verify", written / "out.gguf", "--against", other)
    with pytest.raises(VerificationError, match="relative error"):
        invoke("verify", written / "out", "--against", other)
