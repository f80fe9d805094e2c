"""Two runs on one output: the second is refused at once, whichever command or function it is; nothing is left."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

import tersor
from tersor import store
from tersor.errors import BusyError
from tersor.files import locked
from tersor.hf import compress_model, plan_cache
from tersor.hf.compress import calibrate, dryrun, survey
from tersor.hf.compress.request import Request
from tersor.hf.compress.run import CompressSettings
from tersor.hf.models.source import open_source
from tersor.hf.models.staging import REPORT
from tersor.hf.models.text import default_calibration
from tersor.hf.rom.contest import compress_best
from tersor.hf.rom.run import reduce_model
from tersor.testing import gaussian
from tests.cli.test_cli import fails
from tests.cli.test_cli import tersor as command
from tests.hf.tiny import save_tiny, save_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tiny("llama", tmp_path / "model")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    """An output that somebody else is writing: another thread, which for locks is as another process."""
    entered, ended = Event(), Event()

    def hold() -> None:
        with locked(tmp_path / "out"):
            entered.set()
            ended.wait(60)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        entered.wait(60)
        yield tmp_path / "out"
        ended.set()
        held.result()


@pytest.mark.parametrize("line", [
    "compress MODEL OUT --rate 4", "compress MODEL OUT --rate 4 --dry-run", "encode MODEL OUT --plan plan.json",
    "encode m.npy OUT --codec lm3", "reduce MODEL OUT", "kv-plan MODEL OUT", "calibrate MODEL OUT", "survey MODEL OUT",
    "plan MODEL survey.jsonl OUT", "plan MODEL OUT plan.json", "image picture.png OUT", "decode OTHER --to OUT"])
def test_every_command_that_writes_says_so_at_once(line: str, model: Path, busy: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.zeros((8, 8), np.float32))
    busy_survey = line == "plan MODEL OUT plan.json"
    if busy_survey:
        busy.write_text("a survey that is being written")
    before = sorted(path.name for path in tmp_path.iterdir())
    names = {"MODEL": model, "OUT": busy}
    fails(*(names.get(word, tmp_path / word if "." in word or word == "OTHER" else word) for word in line.split()),
          says=f"{busy}: another run is writing it (process")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("write", [
    lambda model, out: compress_model(model, out, 4.0),
    lambda model, out: reduce_model(model, out),
    lambda model, out: compress_best(model, out, 50_000),
    lambda model, out: plan_cache(open_source(model, out), default_calibration(), 2.5, out),
    lambda model, out: calibrate.run(open_source(model, out), default_calibration(), out),
    lambda model, out: survey.run(open_source(model, out), None, Request(50_000), out),
    lambda model, out: dryrun.estimate(model, out, 4.0, None, CompressSettings()),
    lambda model, out: tersor.save(out, tersor.compress(gaussian((8, 8)), codec="lm3")),
    lambda model, out: store.write(out, [store.Entry("a", (2,), "float32")], lambda entry: {"": torch.ones(2)},
                                   kind="matrices")])
def test_every_function_that_writes_says_so_at_once(write: Callable[[Path, Path], Any], model: Path,
                                                    busy: Path) -> None:
    with pytest.raises(BusyError, match="another run is writing it"):
        write(model, busy)
    assert not busy.exists()
    assert not busy.with_name("out.work").exists()


@pytest.mark.usefixtures("verified_here")
def test_commands_leave_nothing_but_what_they_write(tmp_path: Path) -> None:
    """Of a source that has to be staged: no lock, no empty work folder, no staged model."""
    from safetensors.torch import load_file

    source = save_tiny("llama", tmp_path / "model")
    save_tokenizer(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    place = tmp_path / "made"
    small, text = ("--tokens", 256, "--context", 64), default_calibration()
    for line in (("calibrate", source, place / "c", *small, "--fisher-tokens", 0),
                 ("survey", source, place / "s.jsonl", "--method", "rot,lm3", "--rate", 6),
                 ("plan", source, place / "s.jsonl", place / "p.json", "--method", "rot,lm3", "--rate", 6),
                 ("encode", source, place / "e", "--plan", place / "p.json"),
                 ("encode", source, place / "f", "--plan", place / "p.json", "--calibration-text", text, *small),
                 ("status", place / "f"),
                 ("verify", place / "e", "--against", source),
                 ("compress", source, place / "copy", "--rate", 40),
                 ("compress", source, place / "d", "--rate", 6, "--codec", "rot,lm3", "--dry-run")):
        command(*line)
    assert measured(place / "f") != measured(place / "e")  # it has seen the text
    fails("compress", source, place / "x", "--rate", 0.1, says="needs at least")
    fails("encode", source, place / "x", "--plan", place / "p.json", "--calibration-text", text, "--calibration",
          place / "c", says="expected one of them")
    fails("status", place / "x", says="no such folder")
    assert sorted(path.name for path in place.iterdir()) == ["c", "copy", "e", "f", "p.json", "s.jsonl"]


def measured(out: Path) -> list[float]:
    return [line["distortion"] for line in json.loads((out / REPORT).read_text())["matrices"].values()]
