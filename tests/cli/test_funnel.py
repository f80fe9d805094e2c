"""However a command ends, there is one line on stderr and the right exit code."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from tersor import cli
from tersor.cli import stores
from tersor.cli.funnel import Funnel
from tersor.cli.telling import Voice
from tersor.errors import CorruptStoreError, ModelError, NotAStoreError
from tersor.testing import gaussian
from tests.cli.test_cli import as_json, fails, tersor
from tests.fable import FABLE


@pytest.mark.parametrize(("error", "code", "says"), [
    (ModelError("no\nmodel"), 2, "no model"), (CorruptStoreError("broken"), 3, "broken"),
    (NotAStoreError("elsewhere"), 2, "elsewhere"),
    (KeyError("x"), 1, "fault of Tersor, please report it: KeyError: 'x'"),
    (RecursionError(), 1, "RecursionError"), (KeyboardInterrupt(), 130, "interrupted"), (typer.Abort(), 130, "interr"),
    (OSError(28, "No space left on device", "/x/y"), 2, "/x/y: No space left on device"), (MemoryError(), 2, "memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
    (ModuleNotFoundError("No module named 'png'", name="png"), 2, "package 'png'"),
    (ModuleNotFoundError("No module named 'tersor.x'", name="tersor.x"), 1, "fault of Tersor")])
def test_every_end_is_a_line_and_a_code(error: BaseException, code: int, says: str,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, Funnel():
        raise error
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (code, "")
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("tersor: ")
    assert says in told.err


def test_a_fault_shows_its_traceback_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(stores, "totals", broken)
    np.save(tmp_path / "m.npy", gaussian((8, 16), 0).numpy())
    tersor("encode", tmp_path / "m.npy", tmp_path / "m", "--codec", "lm3")
    plain = tersor("inspect", tmp_path / "m", code=1).stderr
    assert plain.startswith("tersor: this is a fault of Tersor, please report it: ZeroDivisionError: oh (test_")
    assert plain.endswith("--verbose shows the traceback\n")
    loud = tersor("inspect", tmp_path / "m", "--verbose", "--log-file", tmp_path / "log", code=1).stderr
    assert "Traceback" in loud
    assert loud.splitlines()[-1].startswith("tersor: this is a fault")
    assert "ZeroDivisionError: oh" in (tmp_path / "log").read_text()


def test_usage_is_one_line_with_a_hint(tmp_path: Path) -> None:
    fails("compres", says="did you mean 'compress'? see 'tersor --help'")
    fails("compress", "a", "b", "--keep", ".8", says="no such option: --keep; it is an option of tersor reduce; see")
    fails("compress", "a", "b", "--ratee", "3", says="did you mean '--rate'?")
    fails("compress", says="missing argument")
    fails("survey", "a", "b", "--seed", "-1", says="--seed")
    fails("compress", FABLE, tmp_path / "o", "--dry-run", "--seed", "-1", says="--seed")
    fails("compress", FABLE, tmp_path / "o", "--dry-run", "--effort", "quick", says="one of fast, normal, best")
    fails("survey", FABLE, tmp_path / "o", "--effort", "best", "--codec", "qet_plus", says="reads no effort")
    fails("encode", FABLE, tmp_path / "o", "--effort", "best", "--plan", tmp_path / "p", says="no --rate, --codec or")
    fails("inspect", tmp_path, "--log-file", tmp_path / "no" / "log", says="there is no folder")


def test_former_names_are_taken_and_never_both() -> None:
    dry = ("compress", FABLE, "o", "--dry-run", "--uncalibrated", "--evaluation-tokens", 0)
    fails(*dry, "--codec", "rot,lmm3", says="did you mean 'lm3'?")
    fails(*dry, "--method=qet_plsu", says="did you mean 'qet_plus'?")
    fails(*dry, "--codec", "rot,lm3", "--method=lm3", says="--codec and its other name --method")
    for option in ("--calibration-text", "--calibration"):
        fails(*dry, option, "nothere.txt", says="nothere.txt: no such file or directory; expected a UTF-8 text file")
    for option in ("--calibration", "--calib"):
        fails("survey", FABLE, "s.jsonl", option, "nothere", says="expected a file written by 'tersor calibrate'")
    for verb in ("compress", "survey", "plan", "kv-plan"):
        shown = tersor(verb, "-h").stdout
        assert "--method" not in shown
        assert "--calib " not in shown
    assert "default: (3, unless --size is given)" in " ".join(tersor("compress", "--help").stdout.split())
    assert "(SRC with .tersor)" in " ".join(tersor("encode", "-h").stdout.split())


@pytest.mark.parametrize(("arguments", "says"), [
    (("verify", "nothere"), "no such file or directory"), (("inspect", "nothere"), "expected a directory written by"),
    (("evaluate", "nothere", "--against", FABLE), "no such file"), (("decode", "nothere", "--to", "x"), "no such file"),
    (("inspect", FABLE), "no tersor.json"), (("verify", FABLE), "no tersor.json"),
    (("evaluate", FABLE, "--against", FABLE), "no tersor.json"), (("encode", "nofile"), "no such file or directory"),
    (("encode", "nofile.npy"), "no such file or directory"), (("encode", FABLE / "config.json"), "found a .json file"),
    (("encode", FABLE), "tersor plan"), (("encode", FABLE, "--plan", "nothere"), "no such file"),
    (("image", "nothere.png", "o"), "no such file"), (("plan", FABLE, "s", "p"), "tersor survey"),
    (("kv-plan", FABLE, "k", "--ladder", "nothere"), "no such file"),
    (("compress", FABLE.with_name("fable-7n"), "o"), "did you mean"),
    (("survey", FABLE, "s", "--calib", FABLE / "config.json"), "expected a file written by"),
    (("encode", FABLE, "o.npy"), "expected the name of a new directory"),
    (("image", "a.png", "b.png"), "expected the name of a new directory"),
    (("compress", FABLE, "o", "--rate", "3", "--size", "3MB"), "expected either a rate or a size, found both")])
def test_wrong_paths_and_inputs_exit_2(arguments: tuple[object, ...], says: str, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fails(*arguments, says=says)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"mine": 1}')
    fails("calibrate", FABLE, mine, says="exists")
    fails("plan", FABLE, tmp_path / "survey.jsonl", mine, says="exists")
    fails("kv-plan", FABLE, mine, says="no KV plan")
    assert mine.read_text() == '{"mine": 1}'


def test_a_near_name_in_the_folder_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.npy").touch()
    fails("encode", "weight.npy", says="did you mean 'weights.npy'?")
    fails("image", tmp_path / "weigths.npy", "o", says=f"did you mean '{tmp_path}/weights.npy'?")


def test_a_model_without_its_manifest_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "tersor"}}')
    fails("inspect", tmp_path, code=3, says="tersor.json is missing")


def test_results_are_shown_whatever_the_terminal_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "m.npy", gaussian((8, 16), 0).numpy())
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    arguments = ["encode", str(tmp_path / "m.npy"), str(tmp_path / "ü"), "--codec", "lm3"]
    monkeypatch.setattr(sys, "argv", ["tersor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    sys.stdout.flush()
    assert b"m.npy \\u2192" in held.getvalue()


def test_a_log_that_ends_does_not_end_the_work(tmp_path: Path) -> None:
    voice = Voice(quiet=True, log_file=tmp_path / "logs" / "log")
    with pytest.raises(OSError, match="No such file"):
        voice.write("first")
    voice.log("later")
    assert not (tmp_path / "logs").exists()


def test_version_help_and_completion() -> None:
    assert tersor("--version").stdout.startswith("tersor 0.")
    assert tersor("-h").stdout == tersor("--help").stdout
    assert "--install-completion" in tersor("-h").stdout
    assert tersor(code=2).stdout == tersor("-h").stdout
    assert "..." not in tersor("-h").stdout.partition("Commands:")[2]


def test_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stores.store, "read", interrupted)
    done = tersor("inspect", tmp_path, code=130)
    assert done.stdout == ""
    assert done.stderr.startswith("tersor: interrupted")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_is_no_event() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "tersor", "families"], stdout=write, stderr=subprocess.PIPE, text=True,
                          check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_targets_of_decode_and_originals_of_verify(tmp_path: Path) -> None:
    source, out = tmp_path / "m.npy", tmp_path / "m"
    np.save(source, gaussian((16, 32), 0).numpy().astype(np.float16))
    tersor("encode", source, out, "--codec", "lm4")
    fails("decode", out, "--to", tmp_path / "x.pt", says="expected the name of a .npy, found")
    tersor("decode", out, "--to", tmp_path / "back.npy")
    assert np.load(tmp_path / "back.npy").dtype == np.float16
    found = as_json("verify", out, "--against", source)
    assert 0 < found["relative_error"] < 0.02
    np.save(tmp_path / "other.npy", np.zeros((3, 4), np.float32))
    fails("verify", out, "--against", tmp_path / "other.npy", says="expected the original of")
    assert as_json("inspect", out)["kinds"][0]["count"] == 1
