"""The work folder of a run: whose it is, what of it a next run keeps, what stays when the run is done."""

from pathlib import Path

import pytest

from tersor.files import read_sealed_json
from tersor.hf.compress.work import WorkFolder


def left_by_a_run(output: Path, mark: str) -> WorkFolder:
    """Return the folder of a run that was killed while it wrote its output."""
    work = WorkFolder(output).claim()
    work.stamp(mark, resume=True)
    for name in ("survey.jsonl", "plan.json", ".plan.json.partial-17", "encode.part"):
        (work / name).write_text(name)
    for name in ("staged", "matrices", "output", ".output.partial-17"):
        (work / name).mkdir()
        (work / name / "a").write_text(name)
    return work


def names(work: WorkFolder) -> list[str]:
    return sorted(child.name for child in work.path.iterdir())


def test_a_run_of_the_same_mark_keeps_what_is_finished(tmp_path: Path) -> None:
    work = left_by_a_run(tmp_path / "out", "m")
    work.claim().stamp("m", resume=True)
    assert names(work) == ["encode.part", "fingerprint", "matrices", "plan.json", "staged", "survey.jsonl"]


@pytest.mark.parametrize(("mark", "resume"), [("other", True), ("m", False)])
def test_another_run_starts_anew_beside_its_staged_source(mark: str, resume: bool, tmp_path: Path) -> None:
    work = left_by_a_run(tmp_path / "out", "m")
    work.claim().stamp(mark, resume=resume)
    assert names(work) == ["fingerprint", "staged"]
    assert read_sealed_json(work / "fingerprint") == mark


def test_files_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    work = left_by_a_run(tmp_path / "out", "m")
    (work / "calibration.safetensors").write_text("moments")
    work.claim().stamp("m", resume=True)
    assert not (work / "calibration.safetensors").exists()


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        WorkFolder(tmp_path / "out").claim()
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file.work").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        WorkFolder(tmp_path / "file").claim()
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists; remove it"):
        WorkFolder(tmp_path / "there").claim()


@pytest.mark.parametrize(("spent", "left"), [
    (("matrices", "staged"), [".output.partial-17", ".plan.json.partial-17", "encode.part", "fingerprint", "plan.json",
                              "survey.jsonl"]), ((), None)])
def test_the_output_moves_to_its_place(spent: tuple[str, ...], left: list[str] | None, tmp_path: Path) -> None:
    work = left_by_a_run(tmp_path / "out", "m")
    work.finish(*spent)
    assert (tmp_path / "out" / "a").read_text() == "output"
    assert (names(work) if work.path.exists() else None) == left
