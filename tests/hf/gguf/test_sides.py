"""How errors of rows add up, in GGUF files: measured with the calibration, turned as the rows are, and used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.gguf.sided import Across
from tersor.hf.compress import calibrate
from tersor.hf.compress.request import Sampling
from tersor.hf.gguf import encoding, run
from tersor.hf.gguf.inputs import turned_as
from tersor.hf.gguf.run import write_gguf
from tersor.hf.models.source import open_source
from tersor.hf.models.text import default_calibration
from tersor.numerics.sides import ROWS
from tersor.planning.calibration import Calibration
from tersor.testing import gaussian
from tests.hf.gguf.tiny_gguf import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUICK: dict[str, Any] = {"evaluation_tokens": 0, "types": ("Q8_0",), "effort": "fast"}
SAMPLING = Sampling(512, 512, context=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("tiny") / "src")


@pytest.fixture(scope="module")
def moments(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("moments")
    calibrate.run(open_source(folder, place / "staged"), default_calibration(), place / "calib", SAMPLING)
    return place / "calib"


def test_both_ways_use_them_alike(folder: Path, moments: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A file has rows of queries in another order than a directory; a run without moments measures its own."""
    found = Calibration.load(moments)
    assert set(found.sides) == {name for name in found.hessians if "embed" not in name}
    given: list[Any] = []
    encode: Callable[..., Any] = encoding.encode

    def watched(*args: Any) -> Any:
        given.append(args[-1])
        return encode(*args)

    write_gguf(folder, tmp_path / "dense.gguf", 64, calibrated=False, **QUICK)
    monkeypatch.setattr(encoding, "encode", watched)
    monkeypatch.setitem(run.SWEEPS, "fast", 1)
    write_gguf(tmp_path / "dense.gguf", tmp_path / "a.gguf", 9, moments=moments, **QUICK)
    own = dataclasses.replace(SAMPLING, fisher_tokens=64)  # it takes as much as it needs
    write_gguf(folder, tmp_path / "b.gguf", 9, sampling=own, **QUICK)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sum(isinstance(one, Across) for one in given) == 2 * len(found.sides)
    monkeypatch.setitem(run.SWEEPS, "fast", 0)
    write_gguf(folder, tmp_path / "c.gguf", 9, moments=moments, **QUICK)
    assert (tmp_path / "c.gguf").read_bytes() != (tmp_path / "a.gguf").read_bytes()


def test_little_text_says_nothing_of_rows(folder: Path, tmp_path: Path) -> None:
    found = calibrate.run(open_source(folder, tmp_path), default_calibration(), tmp_path / "c",
                          dataclasses.replace(SAMPLING, fisher_tokens=64))
    assert not found.sides
    assert found.fisher


def test_rows_are_found_by_what_they_hold() -> None:
    matrix, sides = gaussian((ROWS + 6, 4)), [gaussian((ROWS, ROWS)), gaussian((6, 6), 1)]
    order = torch.cat([torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)), ROWS + torch.arange(6)])
    turned = turned_as(matrix[order], matrix, sides)
    assert turned is not None
    assert torch.equal(turned[0], sides[0][order[:ROWS]][:, order[:ROWS]])
    assert torch.equal(turned[1], sides[1])
    assert turned_as(matrix, matrix, sides) is sides
    assert turned_as(matrix.flip(0), matrix, sides) is None  # rows of the other block
    assert turned_as(matrix + 1, matrix, sides) is None
