"""Recall does not depend on where vectors lie or in what unit; and writers and readers side by side for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tersor.testing import gaussian
from tersor.vectors import Index
from tersor.vectors.trial import exact, recall
from tests.covering import covering, in_turn

DIM, COUNT, QUERIES, K = 32, 1500, 500, 10
MOST = 0.01  # that recall may change by: 50 of 5,000 neighbours
FAST = ("trellis2", "trellis4", "rotated_scalar3", "qet_plus2", "pq2", "spectral2", "auto2", "rq32x256s5t",
        "IVF16,trellis2")
SHIFT = 3.0  # standard deviations
WRITERS, READERS, BATCH = 4, 8, 20


def moved(x: Tensor, how: str) -> Tensor:
    """Return vectors shifted by three deviations in all numbers, or in another unit."""
    return x + SHIFT * float(x.std()) if how == "shift" else x * {"tiny": 2e-5, "other": 3.7, "large": 3e4}[how]


def made() -> tuple[Tensor, Tensor]:
    """Return vectors and queries, whose variances fall as 1 / i."""
    spread = 1 / torch.arange(1, DIM + 1, dtype=torch.float32).sqrt()
    return gaussian((COUNT, DIM), 1) * spread, gaussian((QUERIES, DIM), 2) * spread


@pytest.mark.parametrize("codec", covering(FAST, [*FAST, "rq32x64s5t", "rq16x256s3t", "opq2"]))
def test_recall_stays_where_vectors_move(codec: str) -> None:
    """Also where codewords stand for few vectors each: 256 of `rq` for 1,500."""
    x, queries = made()
    truth = exact(x, queries, K, "l2")

    def reached(base: Tensor, asked: Tensor) -> float:
        index = Index(DIM, codec, effort="fast")
        index.train(base)
        index.add(base)
        return recall(index.search(asked, K, nprobe=8 if index.nlist else None)[1], truth)

    plain = reached(x, queries)
    assert plain > 0.3
    for how in ("shift", "tiny", "other", "large"):
        together = moved(torch.cat([x, queries]), how)
        assert abs(reached(together[:COUNT], together[COUNT:]) - plain) <= MOST, how


@pytest.mark.parametrize(("codec", "power"), in_turn(
    ("trellis2", "qet_plus2", "pq2", "spectral2", "rq32x256s5t", "IVF16,rq32x16s5t"), (-40, 3, 30)))
def test_powers_of_two_change_no_id(codec: str, power: int) -> None:
    """A unit by a power of two rounds nothing: codes are the same, and distances its square times as long."""
    x, queries = made()
    found = []
    for scale in (1.0, 2.0**power):
        index = Index(DIM, codec)
        index.train(x * scale)
        index.add(x * scale)
        found.append(index.search(queries * scale, K))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0] * 4.0**power, found[1][0])


class Written:
    """What writers have done so far: ids that are surely in the index, and those that once were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held: set[int] = set()
        self.gone: set[int] = set()

    def change(self, added: list[int], removed: list[int]) -> None:
        with self._lock:
            self.held |= set(added)
            self.held -= set(removed)
            self.gone |= set(removed)

    def copies(self) -> tuple[set[int], set[int]]:
        with self._lock:
            return set(self.held), set(self.gone)


def vectors_of(ids: Tensor) -> Tensor:
    """Return the vector that a test gives an id: scattered by it, so that those of any two lie far apart."""
    turns = (ids.double()[:, None] + 1) * 12.9898 + torch.arange(1, DIM + 1, dtype=torch.float64) * 78.233
    return ((turns.sin() * 43758.5453) % 1 * 2 - 1).float()


def write(index: Index, number: int, written: Written, until: float) -> int:
    """Add and remove vectors of this writer's ids; return the changes made."""
    first = changes = 0
    while time.monotonic() < until:
        ids = torch.arange(first, first + BATCH) * WRITERS + number
        index.add_with_ids(vectors_of(ids), ids)
        gone = ids[::2] if first % (2 * BATCH) else ids[:0]
        written.change(ids.tolist(), [])
        if len(gone):
            written.change([], gone.tolist())  # from here on it may be missed
            assert index.remove_ids(gone) == len(gone)
        first, changes = first + BATCH, changes + 1 + bool(len(gone))
        time.sleep(0.002)
    return changes


def read(index: Index, written: Written, until: float) -> int:
    """Ask for vectors that were there before: they are found, unless removed meanwhile. Return the searches made."""
    searches = 0
    while time.monotonic() < until:
        before, _ = written.copies()
        some = torch.tensor(sorted(before)[searches % 7 :: max(1, len(before) // 8)][:8], dtype=torch.int64)
        if not len(some):
            time.sleep(0.01)
            continue
        distances, found = index.search(vectors_of(some), 3)
        _, gone = written.copies()
        assert bool(torch.isfinite(distances).all())
        for own, row in zip(some.tolist(), found.tolist(), strict=True):
            assert own in row or own in gone
        limits, _, inside = index.range_search(vectors_of(some), 0.05)
        assert int(limits[-1]) == len(inside)
        searches += 1
    return searches


@pytest.mark.parametrize("codec", ["trellis4", "IVF8,trellis4"])
@pytest.mark.parametrize("seconds", [1.5, pytest.param(60, marks=pytest.mark.slow)])
def test_writers_and_readers_side_by_side(codec: str, seconds: float, tmp_path: Path) -> None:
    """Four that add and remove and eight that search, on an index whose changes go to its journal."""
    start = torch.arange(10_000_000, 10_000_400)
    index = Index(DIM, codec, effort="fast")
    index.train(vectors_of(torch.arange(2000)))
    index.add_with_ids(vectors_of(start), start)
    index.nprobe = 8
    index.save(tmp_path / "set")
    index, written = Index.open(tmp_path / "set"), Written()
    written.change(start.tolist(), [])
    until = time.monotonic() + seconds
    acts: list[Callable[[], int]] = [lambda n=n: write(index, n, written, until) for n in range(WRITERS)]
    acts += [lambda: read(index, written, until)] * READERS
    with ThreadPoolExecutor(len(acts)) as pool:
        done = [future.result(seconds + 120) for future in [pool.submit(act) for act in acts]]
    assert min(done) > 0
    expected, _ = written.copies()
    assert set(index.ids.tolist()) == expected
    again = Index.load(tmp_path / "set")
    assert set(again.ids.tolist()) == expected
    ids = torch.tensor(sorted(expected))
    assert torch.equal(again.reconstruct(ids), index.reconstruct(ids))
    assert float((index.reconstruct(ids) - vectors_of(ids)).square().mean()) < 0.05
