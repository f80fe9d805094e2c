"""Scores of queries with all vectors that an index holds, whatever the magnitude of either.

Squares of numbers near `2**-70` are nothing in float32, so what is compared is divided by powers of two first, which
changes no digit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.numerics.kmeans import exponent_of, times_power
from tersor.payload.scales import reciprocal
from tersor.vectors.held import Held
from tersor.vectors.nearest import Best


def best_of(held: Held, queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return scores or squared distances, and ids, (queries, k), of the best vectors for float32 queries (n, dim)."""
    if not len(queries):
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
    exponent = exponent_of(queries)
    unit = times_power(queries, -exponent)
    if metric == "cosine":
        unit = unit * reciprocal(torch.linalg.vector_norm(unit, dim=1, keepdim=True))
    elif metric == "l2":
        return _distances(held, unit, exponent, k)
    best = Best(len(queries), k)
    for first, block in held.placed():
        scores = block.encoded.matmul(unit)
        best.offer(scores.mul_(reciprocal(block.norms())) if metric == "cosine" else scores, first)
    return times_power(best.scores, exponent) if metric == "ip" else best.scores, best.ids


def _distances(held: Held, unit: Tensor, exponent: int, k: int) -> tuple[Tensor, Tensor]:
    """Return squared distances and ids for queries that are `2**exponent` times `unit`.

    `|q - x|² = |q|² - 2 (q x - |x|² / 2)`, all divided by the square of a power of two beyond all norms.
    """
    longest = max(float(block.norms().max()) for block in held.blocks)
    size = max(exponent, math.frexp(longest)[1])
    queries = times_power(unit, exponent - 2 * size)
    best = Best(len(unit), k)
    for first, block in held.placed():
        scores = block.encoded.matmul(queries)
        best.offer(scores.sub_(times_power(block.norms(), -size).square_() / 2), first)
    power = times_power(unit, exponent - size).square().sum(1, keepdim=True)
    return times_power((power - 2 * best.scores).clamp_min_(0), 2 * size), best.ids
