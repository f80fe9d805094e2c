"""Ids, removal, filters, ranges, neighbours and refinement: against plain lists of vectors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.errors import BudgetError, CodecConfigError, NonFiniteError, TersorError
from tersor.ops import reference_only
from tersor.payload.layout import packed_nbytes
from tersor.testing import gaussian
from tersor.vectors import Index, fill, open_vectors, state
from tersor.vectors.checks import METRICS
from tersor.vectors.nearest import WORST

DIM = 16
CODECS = ("ctr8,rot,tr4x8", "rot,lm4", "pq2x16t", "pq4x300t", "IVF6,trellis4", "IVF6,rot,lm4", "IVF6,pq4x32t")
X, QUERIES = gaussian((600, DIM), 1) + 1, gaussian((9, DIM), 2) + 1
IDS = torch.randperm(10_000, generator=torch.Generator().manual_seed(3))[:600]


def filled(codec: str, metric: str = "l2") -> Index:
    index = Index(DIM, codec, metric=metric)
    index.train(X)
    index.nprobe = 6
    for part in (slice(0, 200), slice(200, 201), slice(201, 600)):
        index.add_with_ids(X[part], IDS[part])
    return index


def scores_of(index: Index, metric: str) -> torch.Tensor:
    """Return what is better when larger, float64 (queries, n), in the order of `index.ids`."""
    held, wide = torch.as_tensor(index.reconstruct(index.ids)).double(), QUERIES.double()
    if metric == "l2":
        return -(wide[:, None] - held).square().sum(-1)
    if metric == "cosine":
        held, wide = held / held.norm(dim=1, keepdim=True), wide / wide.norm(dim=1, keepdim=True)
    return wide @ held.T


def check(index: Index, metric: str, found: tuple[torch.Tensor, torch.Tensor], allowed: torch.Tensor) -> None:
    """Compare a search with all scores of what is allowed."""
    expected = scores_of(index, metric).masked_fill(~allowed, -math.inf)
    values = expected.topk(min(found[1].shape[1], expected.shape[1])).values
    distances = found[0].double() if metric != "l2" else -found[0].double()
    finite = values.isfinite()
    assert torch.equal(found[1][:, : values.shape[1]] >= 0, finite)
    largest = float(expected[:, allowed].abs().max() + QUERIES.square().sum(1).max())
    bound = 64 * torch.finfo(torch.float32).eps * largest
    assert float((distances[:, : values.shape[1]] - values)[finite].abs().max()) <= bound
    known = {int(one): place for place, one in enumerate(index.ids)}
    places = torch.tensor([[known[int(one)] if one >= 0 else 0 for one in row] for row in found[1]])
    assert float((expected.gather(1, places) - values[:, : places.shape[1]])[finite].abs().max()) <= bound


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codec", CODECS)
def test_ids_filters_and_removal(codec: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "BLOCK_ROWS", 128)
    index = filled(codec, metric)
    assert torch.equal(index.ids, IDS)
    everything = torch.ones(600, dtype=torch.bool)
    mask = torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.1
    for wanted, allowed in ((None, everything), (mask, mask), (IDS[mask], mask), (mask.numpy(), mask),
                            (torch.cat([IDS[mask], torch.tensor([123_456])]), mask)):
        check(index, metric, index.search(QUERIES, 12, filter=wanted), allowed)
        with reference_only():
            check(index, metric, index.search(QUERIES, 12, filter=wanted), allowed)
    few = index.search(QUERIES, 5, filter=IDS[:2])
    assert (few[1][:, 2:] == -1).all()
    assert (few[0][:, 2:] == (WORST if metric == "l2" else -WORST)).all()
    gone = IDS[::3]
    assert index.remove_ids(torch.cat([gone, torch.tensor([99_999])])) == 200
    assert len(index) == 400
    assert not torch.isin(index.search(QUERIES, 400)[1], gone).any()
    check(index, metric, index.search(QUERIES, 30), torch.ones(400, dtype=torch.bool))
    with pytest.raises(CodecConfigError, match=rf"ids must be those of its 400 vectors, found {int(gone[0])}"):
        index.reconstruct(gone[:1])
    index.add_with_ids(X[::3], gone)
    check(index, metric, index.search(QUERIES, 30), everything)
    index.add(X[:3])
    assert index.ids[-3:].tolist() == [int(IDS.max()) + i for i in (1, 2, 3)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codec", CODECS)
def test_all_in_range(codec: str, metric: str) -> None:
    index = filled(codec, metric)
    scores = scores_of(index, metric)
    radius = float(scores.topk(20).values[:, -1].median())
    for compiled in (True, False):
        if compiled:
            limits, distances, ids = index.range_search(QUERIES, -radius if metric == "l2" else radius)
        else:
            with reference_only():
                limits, distances, ids = index.range_search(QUERIES, -radius if metric == "l2" else radius)
        known = {int(one): place for place, one in enumerate(index.ids)}
        sure, near = 1e-4 * scores.abs().max(), 0
        for query in range(9):
            part = slice(int(limits[query]), int(limits[query + 1]))
            places = {known[int(one)] for one in ids[part]}
            assert {int(i) for i in (scores[query] > radius + sure).nonzero()} <= places
            assert not places & {int(i) for i in (scores[query] < radius - sure).nonzero()}
            ordered = distances[part] if metric == "l2" else -distances[part]
            assert (ordered[1:] >= ordered[:-1]).all()
            near += len(places)
        assert near > 60
    assert index.range_search(QUERIES[:0], 1.0)[0].tolist() == [0]
    empty = index.range_search(QUERIES, 0.0 if metric == "l2" else 1e9)
    assert empty[0].tolist() == [0] * 10


def test_lists_are_looked_into_as_far_as_asked() -> None:
    index = filled("IVF6,rot,lm4")
    whole = index.search(X, 5)[1]
    found = [float((index.search(X, 5, nprobe=count)[1] == whole).float().mean()) for count in (1, 3, 6)]
    assert 0.4 < found[0] < found[1] <= found[2] == 1.0
    assert index.search(X[:3], 5, nprobe=100)[1].shape == (3, 5)
    assert Index(DIM, "IVF100").nprobe == 10
    assert Index(DIM, "ivf4,pq1").codec == Index(DIM, "pq", 1).codec
    assert Index(DIM, "trellis2.5").codec == Index(DIM, rate=2.5).codec


@pytest.mark.parametrize("metric", METRICS)
def test_refined_by_originals_and_by_finer_codes(metric: str) -> None:
    coarse, finer = Index(DIM, "ctr,rot,lm1", metric=metric), Index(DIM, "fp32")
    coarse.add(X)
    finer.add(X)
    exact = finer.search(QUERIES, 5, metric)[1]
    bare = float((coarse.search(QUERIES, 5)[1] == exact).float().mean())
    for better in (X, X.numpy(), finer):
        distances, ids = coarse.search(QUERIES, 5, refine=better, refine_k=200)
        assert float((ids == exact).float().mean()) > max(0.95, bare)
        assert torch.allclose(distances, finer.search(QUERIES, 5, metric)[0], rtol=1e-4, atol=1e-4)
    assert coarse.search(QUERIES, 700, refine=X)[1][:, 600:].eq(-1).all()
    for bad, message in ((X[:, :3], r"refine must be \(n, 16\)"), (X[:10], "a row for every id")):
        with pytest.raises(CodecConfigError, match=message):
            coarse.search(QUERIES, 5, refine=bad)
    with pytest.raises(CodecConfigError, match="give refine="):
        coarse.search(QUERIES, 5, refine_k=10)


def test_neighbours_as_scikit_learn_has_them() -> None:
    index = filled("rot,lm4")
    distances, ids = index.kneighbors(QUERIES.numpy(), 4)
    squared, same = index.search(QUERIES.numpy(), 4)
    assert np.array_equal(ids, same)
    assert np.allclose(distances, np.sqrt(squared))
    assert np.array_equal(index.kneighbors(QUERIES.numpy(), 4, return_distance=False), ids)
    cosine = filled("rot,lm4", "cosine").kneighbors(QUERIES, 4)[0]
    assert (cosine[:, 1:] >= cosine[:, :-1]).all()
    with pytest.raises(CodecConfigError, match="expected n_neighbors <= 600, found 601"):
        index.kneighbors(QUERIES, 601)
    with pytest.raises(CodecConfigError, match="no distances"):
        filled("rot,lm4", "ip").kneighbors(QUERIES)


def test_reset_keeps_what_was_trained() -> None:
    for codec in ("pq2x16t", "IVF6,trellis3"):
        index = filled(codec)
        index.reset()
        assert (len(index), index.is_trained, bool(index)) == (0, True, True)
        with pytest.raises(CodecConfigError, match="empty; add vectors"):
            index.search(QUERIES)
        index.add(X[:50])
        assert index.ids.tolist() == list(range(50))
        index.remove_ids(torch.arange(50))
        index.add(X[:2])
        assert index.ids.tolist() == [50, 51]


def test_bytes_of_ids_and_lists_are_counted() -> None:
    plain, named, lists = Index(DIM, "rot,lm4"), Index(DIM, "rot,lm4"), Index(DIM, "IVF6,rot,lm4")
    for index in (plain, named, lists):
        index.train(X)
    plain.add(X)
    named.add_with_ids(X, IDS)
    lists.add(X)
    assert named.nbytes == plain.nbytes + 600 * 8
    assert lists.nbytes == plain.nbytes + 6 * DIM * 4 + packed_nbytes(600, 6)
    assert packed_nbytes(600, 6) == 200  # of six lists, three in a byte
    assert (plain.table_bytes, lists.table_bytes) == (0, 6 * DIM * 4)


def test_bad_ids_and_requests_leave_the_index_as_it_was() -> None:
    index = filled("rot,lm4")
    before = index.search(QUERIES, 9)
    for ids, message in ((IDS[:3], "it has a vector of id"),
                         (torch.tensor([1, 1, 2]), "all be different, found 1 2 times"),
                         (torch.tensor([-1, 1, 2]), r"lie in \[0"), (torch.arange(4), r"one a vector, \(3,\)"),
                         ([0.5, 1, 2], "must be integers"), (["a", "b", "c"], "must be a tensor or an array"),
                         ([True, False, True], "must be integers"), ([2**63 - 1, 0, 1], "lie in"),
                         ([2**64, 0, 1], "ids")):
        with pytest.raises(CodecConfigError, match=message):
            index.add_with_ids(X[:3], ids)
    for act, error in ((lambda: index.add_with_ids(X[:1] * math.nan, [1]), NonFiniteError),
                       (lambda: index.remove_ids([0.5]), CodecConfigError),
                       (lambda: index.search(QUERIES, filter=torch.ones(3, dtype=torch.bool)), CodecConfigError),
                       (lambda: index.search(QUERIES, filter=[0.5]), CodecConfigError),
                       (lambda: index.search(QUERIES, nprobe=0), CodecConfigError),
                       (lambda: index.range_search(QUERIES, -1.0), CodecConfigError),
                       (lambda: index.range_search(QUERIES, math.nan), CodecConfigError),
                       (lambda: index.range_search(QUERIES, "1"), CodecConfigError),
                       (lambda: Index(DIM, metric="dot"), CodecConfigError),
                       (lambda: Index(DIM, "IVF0,trellis"), CodecConfigError),
                       (lambda: Index(DIM, "IVF9999999,trellis"), CodecConfigError),
                       (lambda: Index(DIM, "IVF4,trellis2", 3), CodecConfigError),
                       (lambda: Index(DIM, "trellis.01"), TersorError),
                       (lambda: Index(DIM, "trellis0.01"), BudgetError),
                       (lambda: Index(DIM, "IVF1000").train(X), CodecConfigError),
                       (lambda: Index(DIM, "IVF4").add(X), CodecConfigError),
                       (lambda: filled("IVF6,rot,lm4").sa_encode(X), CodecConfigError)):
        with pytest.raises(error):
            act()
    index.add_with_ids(X[:0], [])
    assert index.remove_ids([]) == 0
    assert len(index) == 600
    assert torch.equal(index.search(QUERIES, 9)[1], before[1])


def test_what_is_no_index_no_file_and_no_sensible_number_is_named(tmp_path: Path) -> None:
    index = filled("rot,lm4")
    before = index.search(QUERIES, 5)[1]
    (tmp_path / "x.parquet").write_text("no table")
    for act, message in (
            (lambda: index.search(QUERIES, 2**70), "k must be at most 1,048,576"),
            (lambda: index.search(QUERIES, np.int64(2**40)), "k must be at most 1,048,576"),
            (lambda: index.search(QUERIES, 5, refine="x.npy"),  # type: ignore[arg-type]
             r"refine must be \(n, 16\), or an index, found str"),
            (lambda: index.merge("other"),  # type: ignore[arg-type]
             "another index expected, found str"),
            (lambda: index.merge(Index(DIM + 1, "rot,lm4")), f"have {DIM} numbers, and those of the other {DIM + 1}"),
            (lambda: Index(2**40), "dim must be at most 1,048,576"),
            (lambda: fill(index, X),  # type: ignore[arg-type]
             "a file of vectors expected, as open_vectors gives it, found Tensor")):
        with pytest.raises(CodecConfigError, match=message):
            act()
    assert torch.equal(index.search(QUERIES, 5)[1], before)
    pytest.importorskip("pyarrow")
    with pytest.raises(CodecConfigError, match="expected a table of parquet"):
        open_vectors(tmp_path / "x.parquet")
