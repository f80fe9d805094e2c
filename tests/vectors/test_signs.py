"""Trellis codes in an index: found by scans of signs as by products with what they decode to, around any mean."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tersor.codecs import Centered
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.ops import reference_only
from tersor.ops.code_scan import compiled
from tersor.registry import parse
from tersor.testing import gaussian
from tersor.vectors import Index, state
from tersor.vectors.checks import METRICS
from tersor.vectors.choice import EFFORTS

DIMS = (8, 25, 50, 96, 100, 384, 768, 1024)


def recall(index: Index, x: torch.Tensor, queries: torch.Tensor) -> float:
    truth = torch.cdist(queries.double(), x.double()).topk(10, largest=False).indices
    return float((index.search(queries, 10)[1].unsqueeze(2) == truth.unsqueeze(1)).any(1).float().mean())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", DIMS)
def test_a_scan_finds_what_a_product_finds(dim: int, metric: str) -> None:
    index, x, queries = Index(dim, rate=4, effort="fast"), gaussian((300, dim), 1) + 2, gaussian((11, dim), 2) + 2
    index.add(x)
    scores, ids = index.search(queries, 9, metric)
    with reference_only():
        expected, numbers = index.search(queries, 9, metric)
    bound = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((scores - expected).abs().max()) <= bound
    assert float((ids == numbers).float().mean()) > 0.95  # all but near ties
    assert 8 * index.code_size <= 4 * dim


def test_a_mean_in_common_costs_nothing() -> None:
    """Neither does scale; where it is not taken away, a mean of three deviations takes half of what is found."""
    x, queries = gaussian((3000, 32), 1), gaussian((60, 32), 2)
    found = []
    for shift, scale in ((0.0, 1.0), (3.0, 1.0), (300.0, 1.0), (0.0, 2.0**20), (3.0, 1e-15)):
        index = Index(32, rate=3, effort="fast")
        index.add((x + shift) * scale)
        found.append(recall(index, (x + shift) * scale, (queries + shift) * scale))
    assert max(found) - min(found) <= 0.02
    bare = Index(32, "rot,tr2.5x8")
    bare.add(x + 3.0)
    assert recall(bare, x + 3.0, queries + 3.0) < found[0] - 0.1


def test_fitted_scales_err_less() -> None:
    """Least squares, and a byte in place of two, against the scale of the row itself."""
    x = gaussian((2000, 64), 1)
    plain, fitted = Index(64, "rot,tr2x8"), Index(64, "ctr8,rot,tr2x8")
    for index in (plain, fitted):
        index.add(x)
    bare, error = (float((index.reconstruct(torch.arange(2000)) - x).square().sum()) for index in (plain, fitted))
    assert error < 1.003 * bare
    assert fitted.code_size == plain.code_size - 1


def test_any_number_of_threads_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, queries = gaussian((900, 50), 1), gaussian((5, 50), 2)
    whole = Index(50, "ctr8,rot,tr2x8")
    whole.add(x)
    expected = whole.search(queries, 12)
    monkeypatch.setattr(state, "BLOCK_ROWS", 100)
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    parts = Index(50, "ctr8,rot,tr2x8")
    parts.train(x)
    for start in range(0, 900, 70):
        parts.add(x[start : start + 70])
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for index in (whole, parts):
            for scores, ids in (index.search(queries, 12), [torch.cat(part) for part in zip(
                    *(index.search(queries[i : i + 1], 12) for i in range(5)), strict=True)]):
                assert torch.equal(ids, expected[1])
                assert torch.allclose(scores, expected[0], rtol=1e-6)


def test_copies_have_their_own_memory(tmp_path) -> None:
    index, queries = Index(50), gaussian((3, 50), 2)
    index.add(gaussian((200, 50), 1))
    expected = index.search(queries, 5)
    copies = [copy.copy(index), copy.deepcopy(index), pickle.loads(pickle.dumps(index))]
    index.save(tmp_path / "set")
    copies.append(Index.load(tmp_path / "set"))
    index.add(gaussian((100, 50), 3))
    del index
    for one in copies:
        scores, ids = one.search(queries, 5)
        assert torch.equal(ids, expected[1])
        assert torch.equal(scores, expected[0])


def test_first_adders_share_one_mean() -> None:
    index, parts = Index(16, effort="fast"), [gaussian((64, 16), seed) for seed in range(4)]
    assert not index.is_trained
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(index.add, parts))
    assert index.ntotal == 256
    assert index.is_trained
    with pytest.raises(CodecConfigError, match="train a new index"):
        index.train(parts[0])


def test_untrained_families_are_centered() -> None:
    for family in ("trellis", "rotated_scalar", "qet_plus"):
        codec = Index(50, family, 3).codec
        assert isinstance(codec, Centered)
        assert codec.lengths
    assert str(Index(50, "scalar", 4).codec).startswith("ctr")
    assert str(Index(50, "scalar", 16).codec) == "bf16"
    assert str(Index(50, "rot,lm3").codec) == "rot,lm3"


def test_efforts_choose_windows() -> None:
    memories = [Index(100, rate=2.5, effort=effort).codec for effort in EFFORTS]
    assert [str(codec) for codec in memories[:2]] == ["ctr8,rot,tr2.25", "ctr8,rot,tr2.25"]
    fast, normal, best = (Index(100, rate=2.1, effort=effort) for effort in EFFORTS)
    assert [str(index.codec) for index in (fast, normal)] == ["ctr8,rot,tr2x8", "ctr8,rot,tr2"]
    assert str(best.codec).startswith("ctr8,rot,tr2x")
    with pytest.raises(CodecConfigError, match="effort must be one of fast, normal, best, found 'fastest'"):
        Index(100, effort="fastest")


def test_vectors_beyond_the_scales_are_refused() -> None:
    index = Index(16, rate=4)
    index.add(gaussian((50, 16), 1))
    with pytest.raises(NonFiniteError, match="times as long as those that the mean was trained on"):
        index.add(gaussian((50, 16), 1) * 2.0**14)
    index.add(torch.zeros(2, 16))
    assert index.ntotal == 52


def test_lengths_need_one_scale_a_row() -> None:
    for codec in ("ctr8,rtn4g4", "ctr8,sum(rot,lm2;rot,lm2)", "ctr8,bf16"):
        with pytest.raises(CodecConfigError, match="lengths need a codec with one scale a row"):
            parse(codec).layout((3, 16))
