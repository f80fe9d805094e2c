"""One query in one call finds what all queries together find."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.ops.dispatch import reference_only
from tersor.testing import gaussian
from tersor.vectors import Index, scoring
from tersor.vectors.checks import METRICS

pytest.importorskip("numba")


def one_by_one(index: Index, queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    found = [index.search(queries[i : i + 1], k, metric) for i in range(len(queries))]
    return torch.cat([one for one, _ in found]), torch.cat([ids for _, ids in found])


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codec", ["ctr8,rot,tr2x8", "rot,tr2x8", "ctr8,ktr9", "err,ctr8,rot,tr2x8"])
@pytest.mark.parametrize("count", [30, 70, 3000])
def test_alone_and_together(codec: str, count: int, metric: str) -> None:
    """Vectors of very unlike lengths, twice each, so that many scores are equal; few tiles and many."""
    x = gaussian((count // 2, 32), 1) * torch.logspace(-2, 2, count // 2)[:, None] + 1
    x = torch.cat([x, x])
    index = Index(32, codec)
    index.train(x)
    index.add(x)
    index.search(x[:1], 1, metric)
    assert index._held.made["alone", metric] is not None
    decoded, mean = index.reconstruct(index.ids), x.mean(0)
    parts = ((mean.norm() + (decoded - mean).norm(dim=1)) / decoded.norm(dim=1)).max()  # a cosine is a sum of two
    queries = torch.cat([x[:20], gaussian((20, 32), 2) * 5, torch.zeros(2, 32)])
    for k in (1, 10, count):
        scores, ids = index.search(queries, k, metric)
        alone, numbers = one_by_one(index, queries, k, metric)
        near, far = queries.norm(dim=1)[:, None], x.norm(dim=1).max()
        size = {"l2": (near + far).square(), "ip": near * far, "cosine": parts.reshape(1, 1)}[metric]
        assert bool(((scores - alone).abs() <= 16 * torch.finfo(torch.float32).eps * size).all())
        same = (ids == numbers) | ((scores - alone).abs() < 16 * torch.finfo(torch.float32).eps * size)
        assert bool(same.all())
        assert float((ids == numbers).float().mean()) > 0.9
        assert all(len(set(row)) == k for row in numbers.tolist())


def test_equal_scores_come_by_id() -> None:
    index = Index(32, "ctr8,rot,tr2x8")
    x = gaussian((1, 32), 1).expand(500, 32)
    index.train(gaussian((100, 32), 2))
    index.add(x)
    assert index.search(x[:1], 7)[1][0].tolist() == list(range(7))


def test_others_look_where_it_must_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries beyond the rows' power of two, lists, filters, words, plain torch."""
    index, x = Index(32, "ctr8,rot,tr4x8"), gaussian((300, 32), 1)
    index.add(x)
    far = x[:1] * 100
    with reference_only():
        expected = index.search(far, 5)[1]
    assert torch.equal(index.search(far, 5)[1], expected)
    assert torch.equal(index.search(x[:1], 1)[1], torch.zeros(1, 1, dtype=torch.int64))  # rows are scaled for both
    asked: list[str] = []
    monkeypatch.setattr(scoring, "nearest", lambda *given: asked.append("alone"))
    index.search(x[:1], 5)
    assert asked == ["alone"]  # which gave None
    index.search(x[:1], 5, filter=[1, 2, 3])
    index.search(x[:2], 5)
    with reference_only():
        index.search(x[:1], 5)
    assert asked == ["alone"]
    monkeypatch.undo()
    for codec in ("IVF4,ctr8,rot,tr2x8", "pq4x16t", "rot,lm3"):
        other = Index(32, codec)
        other.train(x)
        other.add(x)
        other.search(x[:1], 3)
        assert other._held.made.get(("alone", "l2")) is None


def test_copies_have_their_own_memory() -> None:
    index, x = Index(32, "ctr8,rot,tr4x8"), gaussian((300, 32), 1)
    index.add(x)
    expected = index.search(x[:1], 5)
    copies = [copy.copy(index), copy.deepcopy(index), pickle.loads(pickle.dumps(index))]
    index.reset()
    del index
    for one in copies:
        assert torch.equal(one.search(x[:1], 5)[1], expected[1])
        assert torch.equal(one.search(x[:1], 5)[0], expected[0])


def test_changes_are_seen() -> None:
    index, x = Index(32, "ctr8,rot,tr4x8"), gaussian((300, 32), 1)
    index.add(x)
    assert int(index.search(x[7:8], 1)[1]) == 7
    index.remove_ids([7])
    assert int(index.search(x[7:8], 1)[1]) != 7
    index.add_with_ids(x[7:8], [900])
    assert int(index.search(x[7:8].numpy(), np.int64(1))[1][0, 0]) == 900
