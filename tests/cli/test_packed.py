"""The command `tersor compressed-tensors`, and `compress --format compressed-tensors`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from tersor import cli
from tests.hf.tiny import save_tiny

QUICK = ["--uncalibrated", "--evaluation-tokens", "0", "--effort", "fast", "--json"]


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout if result.exception is None else repr(result.exception)


def test_both_commands_write_the_same(tmp_path: Path) -> None:
    folder = save_tiny("llama_tied", tmp_path / "src", torch.bfloat16)
    code, told = invoke("compressed-tensors", folder, tmp_path / "a", "--size", "80kB", *QUICK)
    assert code == 0, told
    record = json.loads(told)
    assert record["bytes"] <= 80_000
    assert "w" in record["schemes"]
    code, told = invoke("compress", folder, tmp_path / "b", "--size", "80kB", "--format", "compressed-tensors", *QUICK)
    assert code == 0, told
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_four_bits_are_the_default(tmp_path: Path) -> None:
    folder = save_tiny("llama_tied", tmp_path / "src", torch.bfloat16, hidden_size=128, intermediate_size=256,
                       head_dim=32)
    code, told = invoke("compressed-tensors", folder, tmp_path / "a", "--schemes", "w4g128", *QUICK)
    assert code == 0, told
    assert json.loads(told)["rate_packed"] == 4.125


def test_options_of_no_use_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama_tied", tmp_path / "src", torch.bfloat16)
    for more, said in ((["--codec", "rot,lm3"], "--codec"), (["--dry-run"], "--dry-run")):
        code, told = invoke("compress", folder, tmp_path / "m", "--format", "compressed-tensors", *more)
        assert code != 0
        assert said in told
    code, told = invoke("compress", folder, tmp_path / "m.gguf", "--format", "gguf", "--whole-model")
    assert code != 0
    assert "--whole-model" in told
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
