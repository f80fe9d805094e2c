"""Lloyd's algorithm: for numbers, exactly, after sorting; and for points, from given centroids."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.kmeans import assign

SORTED_ROUNDS = 60


def midpoints(table: Tensor) -> Tensor:
    """Return the decision thresholds of an ascending table, (levels - 1,)."""
    return (table[1:] + table[:-1]) / 2


def nearest(values: Tensor, edges: Tensor) -> Tensor:
    """Return the index of the nearest entry, uint8 of the shape of `values`."""
    if edges.numel() > 15:
        return torch.bucketize(values.contiguous(), edges, out_int32=True).to(torch.uint8)
    chosen = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for edge in edges.tolist():  # for few levels, comparisons beat a search
        chosen += values > edge
    return chosen


def lloyd_sorted(values: Tensor, levels: int) -> Tensor:
    """Return a 1-D codebook fitted by Lloyd's algorithm, fp16 (levels,), ascending; values are 1-D float32."""
    ordered = values.cpu().sort().values
    total = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.to(torch.float64).cumsum(0)])
    spread = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * (ordered.numel() - 1)
    table = ordered[spread.to(torch.int64)].to(torch.float64)
    for _ in range(SORTED_ROUNDS):
        cuts = torch.searchsorted(ordered, midpoints(table).to(torch.float32), right=True)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([ordered.numel()])])
        count = ends[1:] - ends[:-1]
        means = (total[ends[1:]] - total[ends[:-1]]) / count.clamp_min(1)
        table = torch.where(count > 0, means, table)
    limit = torch.finfo(torch.float16).max
    return table.clamp(-limit, limit).to(torch.float16).sort().values


def lloyd(points: Tensor, centroids: Tensor, rounds: int) -> Tensor:
    """Return centroids (books, words, dim) after Lloyd iterations; those that lose all points stay where they are."""
    books, words, dim = centroids.shape
    first = torch.arange(books, device=points.device).unsqueeze(1) * words
    before: Tensor | None = None
    for _ in range(rounds):
        chosen = assign(points, centroids)
        if before is not None and torch.equal(chosen, before):
            break
        before, place = chosen, (chosen + first).reshape(-1)
        sums = torch.zeros(books * words, dim, dtype=torch.float32, device=points.device)
        sums.index_add_(0, place, points.reshape(-1, dim))
        count = torch.bincount(place, minlength=books * words).unsqueeze(1)
        means = torch.where(count > 0, sums / count.clamp_min(1), centroids.reshape(-1, dim))
        centroids = means.reshape(books, words, dim)
    return centroids
