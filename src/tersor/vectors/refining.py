"""Vectors that a search has found, scored once more: by the originals, or by finer codes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tersor.contract.checks import from_numpy
from tersor.errors import CodecConfigError
from tersor.numerics.kmeans import exponent_of, times_power
from tersor.payload.scales import reciprocal
from tersor.vectors.nearest import WORST


@runtime_checkable
class Reconstructs(Protocol):
    """An index."""

    dim: int

    def reconstruct(self, ids: Tensor) -> Any:
        """Return the vectors of ids."""
        ...


Finer = Tensor | np.ndarray | Reconstructs


def refined(queries: Tensor, ids: Tensor, k: int, metric: str, finer: Finer) -> tuple[Tensor, Tensor]:
    """Return distances and ids, (queries, k), of the best among those named, -1 for none.

    Parameters
    ----------
    queries : Tensor
        float32 (n, dim).
    ids : Tensor
        int64 (n, m), m >= k.
    finer
        Rows that ids number, or an index that has these ids.
    """
    worst = WORST if metric == "l2" else -WORST
    distances = torch.full((len(queries), k), worst)
    best = torch.full((len(queries), k), -1, dtype=torch.int64)
    for i, (query, row) in enumerate(zip(queries, ids, strict=True)):
        own = row[row >= 0].sort().values
        found = _scores(query, _rows(finer, own, queries.shape[1]), metric)
        order = found.argsort(descending=metric != "l2", stable=True)[:k]
        distances[i, : len(order)], best[i, : len(order)] = found[order], own[order]
    return distances, best


def _rows(finer: Finer, ids: Tensor, dim: int) -> Tensor:
    """Return the vectors of ids, float32 (n, dim)."""
    if not isinstance(finer, (Tensor, np.ndarray, Reconstructs)):
        raise CodecConfigError(f"index: refine must be (n, {dim}), or an index, found {type(finer).__name__}")
    if not isinstance(finer, (Tensor, np.ndarray)):
        return torch.as_tensor(finer.reconstruct(ids))
    if finer.ndim != 2 or finer.shape[1] != dim:
        raise CodecConfigError(f"index: refine must be (n, {dim}), or an index, found {tuple(finer.shape)}")
    if len(ids) and int(ids.max()) >= len(finer):
        raise CodecConfigError(f"index: refine must have a row for every id, found {len(finer)} rows and id "
                               f"{int(ids.max())}; give an index with these ids instead")
    found = finer[ids] if isinstance(finer, Tensor) else from_numpy(finer[ids.numpy()], "refine")
    return found.cpu().to(torch.float32)


def _scores(query: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Return squared distances or scores of rows, float32, summed in float64."""
    if not len(rows):
        return rows.new_zeros(0)
    exponent = max(exponent_of(query), exponent_of(rows)) if metric == "l2" else 0
    wide, held = (times_power(one.to(torch.float64), -exponent) for one in (query, rows))
    if metric == "l2":
        return times_power((held - wide).square().sum(1), 2 * exponent).to(torch.float32)
    found = held @ wide
    if metric == "cosine":
        found = found * reciprocal(held.norm(dim=1)) * reciprocal(wide.norm())
    return found.to(torch.float32)
