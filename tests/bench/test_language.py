"""The suite `models`: pipelines run by themselves, and one that was killed goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.suites.language import measure
from bench.suites.language.cases import ModelCase

PIPELINE = ModelCase("smollm2-135m", 2, "pipeline:trellis@fast")


def test_a_pipeline_is_measured_by_itself() -> None:
    others = [ModelCase("fable-22m", 2, f"rtn2g{group}") for group in range(measure.LOCKSTEP + 1)]
    groups = list(measure.at_once([others[0], PIPELINE, *others[1:]]))
    assert groups == [[PIPELINE], others[:-1], others[-1:]]


def test_a_killed_pipeline_goes_on_and_leaves_nothing_when_it_is_done(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "kept", lambda name: tmp_path)
    name = "smollm2-135m-2-pipeline-trellis-fast-cpu"
    (tmp_path / f"{name}.work" / "matrices").mkdir(parents=True)  # of a killed run
    (tmp_path / name).mkdir()  # of one that was killed after it
    with measure.output_of(PIPELINE, "cpu") as output:
        assert output == tmp_path / name
        assert (tmp_path / f"{name}.work" / "matrices").is_dir()
        assert not output.exists()  # which `compress_model` would refuse
        output.mkdir()
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_other_code_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "kept", lambda name: tmp_path / name)
    monkeypatch.setattr(measure.results, "digest", lambda: "one")
    with measure.output_of(PIPELINE, "cpu") as first:
        monkeypatch.setattr(measure.results, "digest", lambda: "another")
        with measure.output_of(PIPELINE, "cpu") as second:
            assert first.parent != second.parent
            assert first.name == second.name == "smollm2-135m-2-pipeline-trellis-fast-cpu"
