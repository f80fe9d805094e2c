"""One index and many threads: nothing is lost, nothing is seen by halves. And arguments that say nothing much."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.errors import CodecConfigError, TersorError
from tersor.testing import gaussian
from tersor.vectors import Index, state

DIM = 16


def together(*acts: Callable[[], object]) -> list[object]:
    """Run all at once, raise what any of them raised, and return what they returned."""
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> object:
        start.wait(20)
        return act()

    with ThreadPoolExecutor(len(acts)) as pool:
        return [future.result(60) for future in [pool.submit(run, act) for act in acts]]


@pytest.mark.parametrize("codec", ["rot,lm4", "pq4x16t", "ctr8,rot,tr4x8"])
def test_adders_lose_nothing(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them, many small adds each, merging blocks as they go; each finds its own in order."""
    monkeypatch.setattr(state, "BLOCK_ROWS", 128)
    index, parts = Index(DIM, codec), [gaussian((150, DIM), seed) + 10.0 * seed for seed in range(4)]
    index.train(torch.cat(parts))

    def add(part: Tensor) -> None:
        for start in range(0, len(part), 12):
            index.add(part[start : start + 12])

    together(*(lambda part=part: add(part) for part in parts))
    assert index.ntotal == 600
    held = index.reconstruct(torch.arange(600))
    kind = (held.mean(1) / 10.0).round()
    assert [int((kind == seed).sum()) for seed in range(4)] == [150] * 4
    for seed, part in enumerate(parts):
        expected = Index(DIM, codec)
        expected._held = type(index._held)(index._held.tables)
        expected.add(part)
        assert torch.equal(held[kind == seed], expected.reconstruct(torch.arange(150)))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_searches_see_one_state(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While vectors are added a search finds what it would find among the first n, for an n of that time."""
    monkeypatch.setattr(state, "BLOCK_ROWS", 128)
    x, queries = gaussian((320, DIM), 1), gaussian((3, DIM), 2)
    index, done = Index(DIM, "rot,lm4"), threading.Event()
    index.add(x[:40])

    def add() -> None:
        for start in range(40, 320, 8):
            index.add(x[start : start + 8])
        done.set()

    def search() -> list[tuple[int, Tensor, int]]:
        found = []
        while not done.is_set():
            before = index.ntotal
            _, ids = index.search(queries, 5, metric)
            index.reconstruct(ids)
            found.append((before, ids, index.ntotal))
            time.sleep(0)
        return found

    _, *seen = together(add, search, search)
    expected = {}
    for count in range(40, 321, 8):
        whole = Index(DIM, "rot,lm4")
        whole.add(x[:count])
        expected[count] = whole.search(queries, 5, metric)[1].tolist()
    for before, ids, after in [one for part in seen for one in part]:  # type: ignore[attr-defined]
        assert any(ids.tolist() == expected[count] for count in range(before, after + 1, 8))
    assert torch.equal(index.search(queries, 320, metric)[1].sort().values, torch.arange(320).expand(3, -1))


def test_training_and_adding_exclude_each_other() -> None:
    """Vectors never meet tables that they were not encoded with; who comes late is told."""
    x = gaussian((200, DIM), 3)
    for _ in range(5):
        index = Index(DIM, "pq4x16t")
        index.train(x)

        def attempt(act: Callable[[Tensor], None]) -> bool:
            try:
                act(x)
            except CodecConfigError:
                return False
            return True

        trained, added = together(*(lambda act=act: attempt(act) for act in (index.train, index.add)))  # type: ignore[misc]
        assert trained or added
        if added:
            decoded = index.reconstruct(torch.arange(200))
            assert torch.equal(decoded, index.sa_decode(index.sa_encode(x)))


def test_saving_while_adding(tmp_path: Path) -> None:
    x, index = gaussian((400, DIM), 4), Index(DIM, "rot,lm4")
    index.add(x[:100])

    def add() -> None:
        for start in range(100, 400, 10):
            index.add(x[start : start + 10])

    together(add, lambda: index.save(tmp_path / "one"))
    count = Index.load(tmp_path / "one").ntotal
    assert 100 <= count <= 400
    assert torch.equal(Index.load(tmp_path / "one").reconstruct(torch.arange(count)),
                       index.reconstruct(torch.arange(count)))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_copies_are_apart(copied: Callable[[Index], Index]) -> None:
    index = Index(DIM, "rot,lm4")
    index.add(gaussian((20, DIM)))
    other = copied(index)
    other.add(gaussian((5, DIM), 1))
    assert (index.ntotal, other.ntotal) == (20, 25)
    assert torch.equal(other.reconstruct(torch.arange(20)), index.reconstruct(torch.arange(20)))


def test_numpys_integers_and_nothing_at_all() -> None:
    """What FAISS takes: such a k, no query, nothing to add or to encode, no id."""
    index, x = Index(np.int64(DIM), "rot,lm4", seed=np.int32(1)), gaussian((100, DIM))
    index.add(x)
    assert torch.equal(index.search(x[:2], np.int64(5))[1], index.search(x[:2], 5)[1])
    for none in (x[:0], x[:0].numpy(), x[:0].double()):
        distances, ids = index.search(none, 120)
        assert distances.shape == ids.shape == (0, 120)
        assert (torch.as_tensor(distances).dtype, torch.as_tensor(ids).dtype) == (torch.float32, torch.int64)
        index.add(none)
        assert index.sa_encode(none).shape == (0, index.code_size)
    assert index.ntotal == 100
    assert index.sa_decode(index.sa_encode(x[:0])).shape == (0, DIM)
    assert index.reconstruct([]).shape == (0, DIM)
    for bad in (np.float64(3), np.bool_(True), np.int64(0), "3", None):
        with pytest.raises(TersorError, match="k must be a positive integer"):
            index.search(x[:1], bad)  # type: ignore[arg-type]
    untrained = Index(DIM, "pq4x16t")
    for act in (untrained.add, untrained.sa_encode):
        with pytest.raises(CodecConfigError, match="not trained"):
            act(x[:0])
    with pytest.raises(CodecConfigError, match="found none"):
        untrained.train(x[:0])
