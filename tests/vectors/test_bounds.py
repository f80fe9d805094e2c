"""Bounds of originals hold for every vector and query, however these lie; and what they allow finds what is true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.transforms.bounded import coded, known
from tersor.errors import CodecConfigError
from tersor.testing import gaussian
from tersor.vectors import Index
from tersor.vectors.trial import exact

DIM, COUNT, K = 32, 1500, 5


def filled(x: Tensor, codec: str = "err,ctr8,rot,tr2x8") -> Index:
    index = Index(DIM, codec)
    index.train(x)
    index.add(x)
    return index


def true_scores(x: Tensor, queries: Tensor, metric: str) -> Tensor:
    wide, asked = x.double(), queries.double()
    if metric == "l2":
        return torch.cdist(asked, wide).square()
    if metric == "ip":
        return asked @ wide.T
    return torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(wide, dim=1).T


def sets(kind: str) -> tuple[Tensor, Tensor]:
    """Vectors and queries: alike, of falling variances, far from 0, or queries that are vectors."""
    x, queries = gaussian((COUNT, DIM), 1), gaussian((20, DIM), 2)
    spread = 1 / torch.arange(1, DIM + 1).sqrt()
    if kind == "anisotropic":
        return x * spread, queries * spread
    if kind == "shifted":
        return x + 30, queries + 30
    return x, x[:20] if kind == "itself" else queries


@pytest.mark.parametrize("kind", ["alike", "anisotropic", "shifted", "itself"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("codec", ["err,ctr8,rot,tr2x8", "IVF8,err,ctr,rot,lm2"])
def test_bounds_are_certain(kind: str, metric: str, codec: str) -> None:
    """Every true score lies between its bounds; by L2 they are no wider than the error allows."""
    x, queries = sets(kind)
    index = filled(x, codec)
    ids = torch.arange(COUNT).expand(len(queries), -1)
    low, high = index.bounds(queries, ids, metric)
    true = true_scores(x, queries, metric)
    assert bool(((low <= true) & (true <= high)).all())
    if metric == "l2":
        error = (index.reconstruct(index.ids) - x).double().norm(dim=1)
        assert bool((high.sqrt() - low.sqrt() <= 2.1 * error + 1e-3).all())


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["alike", "anisotropic", "itself"])
def test_what_bounds_allow_holds_the_true_neighbours(kind: str, metric: str) -> None:
    x, queries = sets(kind)
    index = filled(x, "err,ctr8,rot,tr4x8")
    _, ids = index.search(queries, K, metric, refine=x, refine_k="certain")
    assert torch.equal(ids, exact(x, queries, K, metric))
    few = torch.arange(0, COUNT, 3)
    _, ids = index.search(queries, K, metric, refine=x, refine_k="certain", filter=few)
    assert torch.equal(ids, few[exact(x[few], queries, K, metric)])


def test_lengths_are_rounded_up() -> None:
    lengths = torch.logspace(-1, 1, 999, dtype=torch.float64)
    found = known(torch.ones(1))[coded(lengths, torch.ones(1)).long()].double()
    assert bool(((found >= lengths) & (found <= lengths * 1.05)).all())
    assert coded(torch.tensor([0.0, 1e30], dtype=torch.float64), torch.ones(1)).tolist() == [0, 255]


def test_errors_are_kept_in_files_and_arrays_give_arrays(tmp_path: Path) -> None:
    x, queries = sets("alike")
    index = filled(x)
    assert index.code_size == Index(DIM, "ctr8,rot,tr2x8").code_size + 1
    index.remove_ids([3])
    index.save(tmp_path / "index")
    ids = np.array([[7, -1]])
    low, high = Index.load(tmp_path / "index").bounds(queries[:1].numpy(), ids)
    assert isinstance(low, np.ndarray)
    assert low[0, 1] == -np.inf
    assert high[0, 1] == np.inf
    assert low[0, 0] == index.bounds(queries[:1], torch.from_numpy(ids))[0][0, 0]


def test_bad_questions_are_refused() -> None:
    x, queries = sets("alike")
    plain = Index(DIM, "trellis2", effort="fast")
    plain.add(x)
    with pytest.raises(CodecConfigError, match=r"keeps no errors.*'err,"):
        plain.bounds(queries, plain.search(queries, 2)[1])
    index = filled(x)
    with pytest.raises(CodecConfigError, match="20 rows, found"):
        index.bounds(queries, torch.arange(3))
    with pytest.raises(CodecConfigError, match="must be those of its 1500 vectors, found 1500"):
        index.bounds(queries[:1], torch.tensor([[1500]]))
    with pytest.raises(CodecConfigError, match="'certain', found 'all'"):
        index.search(queries, 2, refine=x, refine_k="all")
    with pytest.raises(CodecConfigError, match="'l2' and 'ip'"):
        index.search(queries, 2, "cosine", refine=x, refine_k="certain")
    assert len(index.search(queries, 2)[1]) == 20
