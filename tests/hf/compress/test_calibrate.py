"""Text read block by block: a killed reading goes on between two blocks, to the same bytes; others' sums are left."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.errors import DamagedWorkWarning
from tersor.hf.compress import calibrate, checkpoint, encode, survey
from tersor.hf.compress.reading import Reading
from tersor.hf.compress.request import Request, Sampling, provenance
from tersor.hf.compress.sensitivity import Fisher
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.flow import Flow
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.streamed import Streamed
from tersor.hf.models.text import default_calibration
from tersor.planning.calibration import Calibration
from tersor.registry import parse
from tests.hf.tiny import save_tiny, save_tokenizer

SAMPLING = Sampling(1024, 256, 32)
FISHER, MOMENTS = "c.fisher", "c.moments"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = save_tiny("qwen3_moe", tmp_path_factory.mktemp("moe") / "model")  # experts that some batches pass by
    save_tokenizer(folder)
    return open_source(folder, folder / "staged")


@pytest.fixture(scope="module")
def unbroken(source: Source, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("unbroken") / "c"
    calibrate.run(source, default_calibration(), file, SAMPLING)
    return file.read_bytes()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)


def interrupted(source: Source, file: Path, at: tuple[str, float], sampling: Sampling = SAMPLING) -> list[str]:
    """Calibrate until a share of a stage is done; return what is left."""
    def stop(stage: str, done: int, total: int) -> None:
        if stage == at[0] and done >= at[1] * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate.run(source, default_calibration(), file, sampling, progress=stop)
    return sorted(left.name for left in file.parent.iterdir())


def resumed(source: Source, file: Path) -> None:
    calibrate.run(source, default_calibration(), file, SAMPLING)
    assert [left.name for left in file.parent.iterdir()] == ["c"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("at", "left"), [(("calibrate", 0.7), [FISHER]), (("moments", 0.6), [FISHER, MOMENTS])])
def test_it_goes_on_to_the_same_bytes(at: tuple[str, float], left: list[str], source: Source, unbroken: bytes,
                                      tmp_path: Path) -> None:
    assert interrupted(source, tmp_path / "c", at) == left
    resumed(source, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == unbroken


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", [MOMENTS, FISHER])
def test_damaged_sums_are_made_again(name: str, source: Source, unbroken: bytes, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "c", ("moments", 0.6))
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.warns(DamagedWorkWarning, match=f"{name}: not as it was written.*made again"):
        resumed(source, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == unbroken


@pytest.mark.usefixtures("hasty")
def test_sums_of_another_job_are_not_taken(source: Source, unbroken: bytes, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "c", ("moments", 0.6), Sampling(1024, 256, 32, seed=1))
    resumed(source, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == unbroken


def test_sums_are_saved_seldom(source: Source, tmp_path: Path) -> None:
    """Every half minute at most, and in a tenth of the time: what takes no half minute saves nothing."""
    assert interrupted(source, tmp_path / "c", ("moments", 0.9)) == []
    slow = checkpoint.Pace()
    slow._cost, slow._saved = 60.0, slow._saved - 599
    assert not slow.due()
    slow._saved -= 2
    assert slow.due()


def test_the_file_has_no_bit_that_is_believed(unbroken: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(unbroken)
    assert Calibration.load(tmp_path / "c").tokens == 1024


def by_blocks(source: Source, folder: Path, *, whole: bool = False) -> tuple[dict[str, float], Calibration, Path]:
    """Survey and encode block by block; return the survey's errors, what is known of the text, and the output."""
    work, request = WorkFolder(folder / "out"), Request(source.nbytes, "rot,lm3")
    work.path.mkdir(parents=True, exist_ok=True)
    reading = Reading.of(source, default_calibration(), SAMPLING, work / "activations", whole=whole)
    known = calibrate.sensitivities(reading, work / "sensitivities.json")
    choices = survey.run(source, known, request, work / "survey.jsonl", reading=reading)
    picks = dict.fromkeys(source.layout.matrices, parse("rot,lm3"))
    job = encode.Job(source, picks, known, request, provenance(source, known, request, "0"))
    encode.run(job, work, reading=reading)
    return {name: one[0].distortion for name, one in choices.items()}, known, work / "output"


def test_what_a_pass_of_text_took_is_given_back_before_matrices_are_encoded(
        source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else encoders find it taken, and a run holds more than is foretold: which is the more of the two, not the sum."""
    order: list[str] = []

    def told(place: Any, name: str, word: str) -> None:
        own = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, **named: (order.append(word), own(*given, **named))[1])

    told(Flow, "beside", "text")
    told(encode, "give_back", "back")
    told(encode, "_encode", "encode")
    by_blocks(source, tmp_path)
    passes = [place for place, word in enumerate(order) if word == "text"]
    assert len(passes) >= 2
    assert all(order[place + 1 : place + 3] == ["back", "encode"] for place in passes)


def test_a_survey_by_blocks_sees_what_the_whole_model_shows(source: Source, tmp_path: Path) -> None:
    """By blocks, by the model at once, and by a file of all moments: the same figures, of one and the same text."""
    streamed, known, _ = by_blocks(source, tmp_path / "a")
    at_once = by_blocks(source, tmp_path / "b", whole=True)[0]
    calibrate.run(source, default_calibration(), tmp_path / "c", SAMPLING)
    calibration = Calibration.load(tmp_path / "c")
    assert calibration.fisher == known.fisher
    listed = survey.run(source, calibration, Request(source.nbytes, "rot,lm3"), tmp_path / "survey.jsonl")
    for name, distortion in streamed.items():
        assert distortion == pytest.approx(at_once[name], rel=1e-4)
        assert distortion == pytest.approx(listed[name][0].distortion, rel=1e-4)


def test_bytes_do_not_depend_on_threads(source: Source, tmp_path: Path) -> None:
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        output = by_blocks(source, tmp_path / str(count))[2]
        found.append((output / "model.safetensors").read_bytes())
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_sensitivities_read_the_beginnings_of_windows(source: Source, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def fisher(streamed: Streamed, sequences: torch.Tensor, seed: int, room: Path | None) -> Fisher:
        seen.append(sequences)
        return Fisher(streamed, sequences, seed, room)

    sampling = Sampling(1024, 64, 32, fisher_context=16)
    reading = Reading.of(source, default_calibration(), sampling, tmp_path / "activations")
    calibrate.sensitivities(reading, tmp_path / "file", fisher=fisher)
    assert torch.equal(seen[0], reading.sequences[::8, :16])  # four of 32 windows


@pytest.mark.parametrize(("name", "onward"), [("llama", True), ("llama_tied", False)])
def test_the_last_block_runs_on_only_where_matrices_follow(name: str, onward: bool, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run, through = save_tiny(name, tmp_path / "model"), list[int](), Flow.through
    save_tokenizer(folder)
    source = open_source(folder, folder / "staged")

    def told(self: Flow, stage: int, **how: Any) -> dict[str, torch.Tensor]:
        if not how["watch"]:
            run.append(stage)
        return through(self, stage, **how)

    monkeypatch.setattr(Flow, "through", told)
    by_blocks(source, tmp_path)
    last = max(block for block in range(9) if f"model.layers.{block}.mlp.up_proj.weight" in source.layout.matrices)
    assert (last in run) == onward
    assert last - 1 in run
