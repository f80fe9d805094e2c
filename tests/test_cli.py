"""The installed command: stages on the bundled model, matrices, and one-line errors with the right exit code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor.testing import gaussian

ROOT = Path(__file__).parent.parent
FABLE = ROOT / "examples" / "fable-7m"
COMMAND = Path(sys.executable).parent / "tersor"


def tersor(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(COMMAND), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def as_json(*arguments: object) -> dict[str, Any]:
    return json.loads(tersor(*arguments, "--json").stdout)


def fails(*arguments: object, code: int = 2, says: str) -> None:
    done = tersor(*arguments, code=code)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("tersor: "), done.stderr
    assert says in lines[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "M.npy"
    np.save(path, gaussian((64, 256), 0).numpy())
    return path


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("fable") / "out"
    return out, as_json("compress", FABLE, out, "--rate", 3, "--tokens", 4096, "--evaluation-tokens", 1024)


def test_compress_meets_the_budget_and_reports(compressed: tuple[Path, dict[str, Any]]) -> None:
    out, report = compressed
    on_disk = sum(f.stat().st_size for f in out.iterdir() if f.suffix == ".safetensors" or f.name == "tersor.json")
    assert report["bytes"] == on_disk
    assert 0.995 * 3 <= 8 * on_disk / report["parameters"] <= 3
    assert {"perplexity", "kl", "top1", "bytes", "rate"} <= set(report)
    assert 0 < report["kl"] < 0.6
    assert report["perplexity"] > report["perplexity_original"] > 1
    page = Path(report["report"]).read_text()
    assert "model.layers.0.mlp.up_proj.weight" in page
    assert "Plotly.newPlot" in page
    assert "src=\"http" not in page  # one self-contained file
    assert not list(out.glob("*.html"))  # beside the model, not in it


def test_inspect_verify_evaluate_decode(compressed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, report = compressed
    shown = as_json("inspect", out)
    assert shown["bytes"] == report["bytes"]
    assert len(shown["entries"]) == 43 + 13
    assert as_json("verify", out, "--against", FABLE)["matrices"] == 43
    scores = as_json("evaluate", out, "--against", FABLE, "--tokens", 1024)
    assert scores["kl"] == pytest.approx(report["kl"], rel=1e-4)
    tersor("decode", out, "--to", tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").stat().st_size > 13_000_000


def test_damage_exits_3(compressed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compressed[0], copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    fails("verify", copy, code=3, says="SHA-256")


def test_stages_one_by_one(tmp_path: Path) -> None:
    survey, plan, out = tmp_path / "survey.jsonl", tmp_path / "plan.json", tmp_path / "out"
    tersor("survey", FABLE, survey, "--rate", 4)
    made = as_json("plan", FABLE, survey, plan, "--size", "3.4MB")
    assert 0.995 * 3_400_000 <= made["bytes"] <= 3_400_000
    edited = json.loads(plan.read_text())
    edited["model.layers.0.mlp.up_proj.weight"] = "rtn4g64"
    plan.write_text(json.dumps(edited))
    tersor("encode", FABLE, out, "--plan", plan)
    codecs = {e["name"]: e["codec"] for e in as_json("inspect", out)["entries"]}
    assert codecs["model.layers.0.mlp.up_proj.weight"] == "rtn4g64"


def test_matrix_round_trip(matrix: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "m", tmp_path / "back.npy"
    record = as_json("encode", matrix, out, "--codec", "rot,lm3")
    assert record["rate"] == pytest.approx(3 + 16 / 256)
    tersor("decode", out, "--to", back)
    original, decoded = np.load(matrix), np.load(back)
    error = float(((original - decoded) ** 2).sum() / (original**2).sum())
    assert error == pytest.approx(record["relative_error"], rel=1e-3)
    family = as_json("encode", matrix, tmp_path / "f", "--codec", "uniform", "--rate", 4)
    assert family["rate"] <= 4


def test_bad_input_is_one_line(matrix: Path, tmp_path: Path) -> None:
    fails("compress", tmp_path / "nowhere", tmp_path / "o", says="no such file")
    fails("compress", tmp_path, tmp_path / "o", says="config.json")
    fails("compress", FABLE, tmp_path / "o", "--rate", 0.3, "--uncalibrated", says="needs at least")
    fails("compress", FABLE, tmp_path / "o", "--size", "many", says="expected a number and a unit")
    fails("compress", FABLE, FABLE, says="exists")
    fails("compress", FABLE, tmp_path / "o", "--rate", "nan", says="between 0 and 64")
    fails("compress", FABLE, tmp_path / "o", "--device", "banana", says="cannot be used here")
    fails("compress", FABLE, tmp_path / "o", "--option", "foo=1", says="reads the option")
    fails("compress", FABLE, tmp_path / "o", "--method", "nosuch", says="rotated_scalar")
    (tmp_path / "o.work").mkdir()
    (tmp_path / "o.work" / "thesis.txt").write_text("mine")
    fails("compress", FABLE, tmp_path / "o", says="holds others")
    assert (tmp_path / "o.work" / "thesis.txt").read_text() == "mine"
    (tmp_path / "o.work" / "thesis.txt").unlink()
    precious = tmp_path / "precious.txt"
    precious.write_text("mine\nmine\n")
    fails("survey", FABLE, precious, says="not a survey")
    assert precious.read_text() == "mine\nmine\n"
    fails("encode", matrix, tmp_path / "o", "--codec", "nonsense", says="nonsense")
    fails("encode", matrix, tmp_path / "o", "--codec", "lm3", "--option", "clip=1", says="option")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    fails("compress", FABLE, tmp_path / "o", "--calibration", short, says="fewer than one context")
    assert not list((tmp_path / "o.work").iterdir())
    tersor("compress", "--no-such-option", code=2)
    assert not (tmp_path / "o").exists()
