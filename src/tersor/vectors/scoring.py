"""Scores of queries with all vectors that an index holds, whatever the magnitude of either.

Squares of numbers near `2**-70` are nothing in float32, so what is compared is divided by powers of two first, which
changes no digit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.numerics.kmeans import exponent_of, times_power
from tersor.ops import sign_scan
from tersor.ops.dispatch import compiled_allowed
from tersor.payload.scales import reciprocal
from tersor.vectors.held import Held
from tersor.vectors.nearest import Best
from tersor.vectors.signs import are_signs, filtered


def best_of(held: Held, queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return scores or squared distances, and ids, (queries, k), of the best vectors for float32 queries (n, dim)."""
    if not len(queries):
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
    if metric == "l2":
        mean = held.blocks[0].mean
        return _distances(held, queries if mean is None else queries - mean, k)
    exponent = exponent_of(queries)
    unit = times_power(queries, -exponent)
    if metric == "cosine":
        unit = unit * reciprocal(torch.linalg.vector_norm(unit, dim=1, keepdim=True))
    if _scans(held):
        scores, ids = _scanned(held, unit, k, metric, 0)
    else:
        best = Best(len(queries), k)
        for first, block in held.placed():
            found = block.encoded.matmul(unit)
            best.offer(found.mul_(reciprocal(block.norms())) if metric == "cosine" else found, first)
        scores, ids = best.scores, best.ids
    return times_power(scores, exponent) if metric == "ip" else scores, ids


def _distances(held: Held, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return squared distances, less what mean there is on both sides, and ids.

    `|q - x|² = |q|² - 2 (q x - |x|² / 2)`, all divided by the square of a power of two beyond all norms.
    """
    exponent = exponent_of(queries)
    unit = times_power(queries, -exponent)
    size = max(exponent, math.frexp(held.longest)[1])
    power = times_power(unit, exponent - size).square().sum(1, keepdim=True)
    if _scans(held):
        scores, ids = _scanned(held, times_power(unit, exponent - size), k, "l2", size)
    else:
        queries = times_power(unit, exponent - 2 * size)
        best = Best(len(unit), k)
        for first, block in held.placed():
            found = block.core.matmul(queries)
            best.offer(found.sub_(times_power(block.norms(core=True), -size).square_() / 2), first)
        scores, ids = best.scores, best.ids
    return times_power((power - 2 * scores).clamp_min_(0), 2 * size), ids


def _scans(held: Held) -> bool:
    """Tell whether codes are scanned as signs, and not multiplied."""
    return are_signs(held.blocks[0].core) and compiled_allowed("sign_scan")


def _scanned(held: Held, queries: Tensor, k: int, metric: str, size: int) -> tuple[Tensor, Tensor]:
    """Return scores, float32, and ids from a scan; see `Block.scanned`."""
    head = held.blocks[0]
    products, means = filtered(head.core, queries), queries.new_zeros(len(queries), dtype=torch.float64)
    if head.mean is not None and metric != "l2":
        means = queries.to(torch.float64) @ head.mean.to(torch.float64)
    weights = {"l2": torch.ones_like(means), "ip": torch.zeros_like(means), "cosine": means}[metric]
    scores, ids = sign_scan.best(held.scanned(metric, size), products, weights, k)
    return (scores + means[:, None] if metric == "ip" else scores).to(torch.float32), ids
