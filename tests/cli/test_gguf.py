"""The command `tersor gguf`, and `compress --format gguf`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tersor import cli
from tests.hf.gguf.tiny_gguf import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUICK = ["--uncalibrated", "--evaluation-tokens", "0", "--effort", "fast", "--json"]


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout if result.exception is None else repr(result.exception)


def test_both_commands_write_the_same_file(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "src")
    code, told = invoke("gguf", folder, tmp_path / "a.gguf", "--size", "400kB", *QUICK)
    assert code == 0, told
    record = json.loads(told)
    assert record["bytes"] == (tmp_path / "a.gguf").stat().st_size <= 400_000
    assert "types" in record
    assert Path(record["report"]).is_file()
    code, told = invoke("compress", folder, tmp_path / "b.gguf", "--size", "400kB", "--format", "gguf", *QUICK)
    assert code == 0, told
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_types_can_be_named(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "src")
    code, told = invoke("gguf", folder, tmp_path / "a.gguf", "--size", "1MB", "--types", "Q6_K,Q8_0", *QUICK)
    assert code == 0, told
    assert {line["type"] for line in json.loads((tmp_path / "a.gguf.report.json").read_text())["tensors"].values()} <= {
        "F32", "BF16", "Q6_K", "Q8_0"}
    code, told = invoke("gguf", folder, tmp_path / "b.gguf", "--types", "Q7_K", *QUICK)
    assert code != 0
    assert "Q7_K" in told


def test_options_of_no_use_are_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "src")
    for more, said in ((["--format", "onnx"], "onnx"), (["--format", "gguf", "--codec", "rot,lm3"], "--codec")):
        code, told = invoke("compress", folder, tmp_path / "m.gguf", *more)
        assert code != 0
        assert said in told
    assert not (tmp_path / "m.gguf").exists()
