"""The installed command: stages on the bundled model, matrices, and one-line errors with the right exit code."""

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tersor import images
from tersor.__main__ import main
from tersor.api import as_matrix
from tersor.cli import stores
from tersor.testing import gaussian
from tests.fable import FABLE

COMMAND = Path(sys.executable).parent / "tersor"


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def tersor(*arguments: object, code: int = 0) -> Done:
    """Run the command in this process, which has long imported torch; what is installed is run once, below."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout),
          contextlib.redirect_stderr(stderr)):
        patch.setattr(sys, "argv", ["tersor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    done = Done(int(ended.value.code or 0), stdout.getvalue(), stderr.getvalue())
    assert done.code == code, f"exit {done.code}\n{done.stdout}\n{done.stderr}"
    return done


def installed(*arguments: object) -> Done:
    """Run the installed command in a process of its own."""
    done = subprocess.run([str(COMMAND), *map(str, arguments)], capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def as_json(*arguments: object) -> dict[str, Any]:
    return json.loads(tersor(*arguments, "--json").stdout)


def fails(*arguments: object, code: int = 2, says: str) -> None:
    is_one_line(tersor(*arguments, code=code), says)


def is_one_line(done: Done, says: str) -> None:
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
def compressed(short: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("short") / "out"
    return out, as_json("compress", short, out, "--rate", 2, "--tokens", 1024, "--evaluation-tokens", 512,
                        "--effort", "fast")


def test_compress_meets_the_budget_and_reports(compressed: tuple[Path, dict[str, Any]]) -> None:
    out, report = compressed
    on_disk = sum(f.stat().st_size for f in out.iterdir() if f.suffix == ".safetensors" or f.name == "tersor.json")
    assert report["bytes"] == on_disk
    assert 0.995 * 2 <= 8 * on_disk / report["parameters"] <= 2
    assert {"perplexity", "kl", "top1", "bytes", "rate"} <= set(report)
    assert 0 < report["kl"] < 1.2  # at 2 bits; the original, a third of whose layers are left, is no good model itself
    assert report["perplexity"] > report["perplexity_original"] > 1
    page = Path(report["report"]).read_text()
    assert "model.layers.0.mlp.up_proj.weight" in page
    assert page.count("<svg") >= 5  # legends, maps and bars
    assert "How both go on" in page
    assert "src=\"http" not in page  # one self-contained file
    assert not list(out.glob("*.html"))  # beside the model, not in it


def test_inspect_verify_evaluate_decode(short: Path, compressed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, report = compressed
    shown = as_json("inspect", out)
    assert shown["bytes"] == report["bytes"]
    assert len(shown["entries"]) == 15 + 5
    assert as_json("verify", out, "--against", short)["matrices"] == 15
    scores = as_json("evaluate", out, "--against", short, "--tokens", 512)
    assert scores["kl"] == pytest.approx(report["kl"], rel=1e-4)
    tersor("decode", out, "--to", tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").stat().st_size > 3_660_000


def test_the_installed_command(matrix: Path, tmp_path: Path) -> None:
    """Exit codes 0 and 2 of a process of its own, 3 as of this; only JSON on stdout, only one line on stderr."""
    out = tmp_path / "m"
    done = installed("encode", matrix, out, "--codec", "rot,lm3", "--json")
    assert done.code == 0
    assert json.loads(done.stdout)["rate"] == pytest.approx(3 + 16 / 256)
    done = installed("encode", matrix, out, "--codec", "rot,lm3")
    assert (done.code, done.stdout) == (2, "")
    is_one_line(done, "exists")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (out / "model.safetensors").write_bytes(data)
    done = tersor("verify", out, code=3)
    assert done.stdout == ""
    is_one_line(done, "SHA-256")


def test_damage_exits_3(compressed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compressed[0], copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    fails("verify", copy, code=3, says="SHA-256")


@pytest.mark.usefixtures("verified_here")
def test_stages_one_by_one(short: Path, tmp_path: Path) -> None:
    survey, plan, out = tmp_path / "survey.jsonl", tmp_path / "plan.json", tmp_path / "out"
    family = ("--method", "rotated_scalar")  # the default family's search is run by `compress`, above
    tersor("survey", short, survey, "--rate", 4, *family)
    made = as_json("plan", short, survey, plan, "--size", "925kB", *family)
    assert 0.995 * 925_000 <= made["bytes"] <= 925_000
    edited = json.loads(plan.read_text())
    edited["model.layers.0.mlp.up_proj.weight"] = "rtn4g64"
    plan.write_text(json.dumps(edited))
    tersor("encode", short, out, "--plan", plan)
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
    assert not (tmp_path / "o.work").exists()
    tersor("compress", "--no-such-option", code=2)
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    y, x = np.mgrid[:96, :128]
    base = 30000 + 20000 * np.sin(x / 9) * np.cos(y / 13)
    samples = np.stack([base, 60000 - base, base / 2, 65535 * (x > 3)], 2).astype(np.uint16)
    path.write_bytes(images.to_png(images.from_array(samples)))
    return path


def test_image_round_trip(photo: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "o", tmp_path / "back.png"
    report = as_json("image", photo, out, "--rate", 2)
    on_disk = sum(f.stat().st_size for f in out.iterdir())
    assert report["bytes"] == on_disk
    assert report["rate"] <= 2
    assert report["rate"] == pytest.approx(8 * on_disk / (96 * 128 * 4))
    assert report["bits_per_pixel"] == pytest.approx(8 * on_disk / (96 * 128))
    assert (report["mode"], report["width"], report["height"], report["bits"]) == ("RGBA", 128, 96, 16)
    as_json("decode", out, "--to", back)
    original, decoded = images.read(photo), images.read(back)
    assert (decoded.bits, decoded.samples.shape) == (16, (96, 128, 4))
    noise = ((original.samples.astype(float) - decoded.samples.astype(float)) ** 2).mean()
    assert report["psnr_db"] == pytest.approx(10 * math.log10(65535**2 / noise))
    tersor("decode", out, "--to", tmp_path / "back.npy")
    assert np.array_equal(np.load(tmp_path / "back.npy"), decoded.samples)
    page = (tmp_path / "o.report.html").read_text()
    assert page.count("src='data:image/png;base64,") == 3
    assert "http" not in page
    assert as_json("verify", out)["matrices"] == 1
    sized = as_json("image", photo, tmp_path / "s", "--size", "18kB", "--channels", "separate", "--codec", "uniform")
    assert 9000 < sized["bytes"] <= 18_000


def test_image_bad_input(photo: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:-40])
    fails("image", cut, tmp_path / "o", says="truncated")
    fails("image", FABLE / "config.json", tmp_path / "o", says="expected a PNG")
    fails("image", tmp_path / "none.png", tmp_path / "o", says="no such file")
    fails("image", photo, tmp_path / "o", "--rate", 2, "--size", "9kB", says="not both")
    fails("image", photo, tmp_path / "o", "--size", "300", says="headers and manifest")
    fails("image", photo, tmp_path / "o", "--channels", "blue", says="patches")
    fails("image", photo, tmp_path / "o", "--codec", "nonsense", says="nonsense")
    assert [f.name for f in tmp_path.iterdir()] == ["cut.png"]
    fails("image", photo, tmp_path, says="exists")
    precious = tmp_path / "o.report.html"
    precious.write_text("mine")
    fails("image", photo, tmp_path / "o", says="exists")
    assert precious.read_text() == "mine"
    precious.unlink()
    tersor("image", photo, tmp_path / "o", "--codec", "rot,lm4")
    fails("decode", tmp_path / "o", "--to", cut, says="exists")
    fails("decode", tmp_path / "o", "--to", tmp_path / "back.jpg", says=".png")
    data = bytearray((tmp_path / "o" / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (tmp_path / "o" / "model.safetensors").write_bytes(data)
    fails("decode", tmp_path / "o", "--to", tmp_path / "back.png", code=3, says="SHA-256")
    assert not (tmp_path / "back.png").exists()


def test_matrices_are_mapped_not_read(matrix: Path, tmp_path: Path) -> None:
    array = stores.open_npy(matrix)
    held = as_matrix(array)
    assert isinstance(array, np.memmap)
    assert held.data_ptr() == array.ctypes.data  # no copy
    before = matrix.read_bytes()
    held[0, 0] += 1
    assert matrix.read_bytes() == before
    for name, content in (("empty.npy", b""), ("cut.npy", before[:2000]), ("text.npy", b"hello")):
        (tmp_path / name).write_bytes(content)
        fails("encode", tmp_path / name, tmp_path / "o", "--codec", "rtn4", says="expected a .npy file")
    for name, array in (("ints.npy", np.arange(6).reshape(2, 3)), ("cube.npy", np.zeros((2, 2, 2))),
                        ("objects.npy", np.array([{}], object)), ("none.npy", np.zeros((0, 3)))):
        np.save(tmp_path / name, array)
        fails("encode", tmp_path / name, tmp_path / "o", "--codec", "rtn4", says="expected a")
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    fails("encode", tmp_path / "nan.npy", tmp_path / "o", "--codec", "rtn4", says="NaN")
    assert not (tmp_path / "o").exists()


def test_encode_prints_the_frobenius_error_and_takes_options(matrix: Path, tmp_path: Path) -> None:
    record = as_json("encode", matrix, tmp_path / "o", "--codec", "rtn3g64", "--option", "clip=mse")
    tersor("decode", tmp_path / "o", "--to", tmp_path / "back.npy")
    original, decoded = np.load(matrix), np.load(tmp_path / "back.npy")
    error = np.linalg.norm(original - decoded) / np.linalg.norm(original)
    assert record["frobenius_error"] == pytest.approx(error, rel=1e-5)
    assert decoded.shape == original.shape
