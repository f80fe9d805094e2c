"""The meaning of a scan, in plain torch and float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.sign_scan.shapes import WORD

if TYPE_CHECKING:
    from tersor.ops.sign_scan import Lines


def best(lines: Lines, products: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows, (queries, k); see the op."""
    queries = len(products)
    scores = torch.full((queries, k), -math.inf, dtype=torch.float64)
    ids = torch.full((queries, k), -1, dtype=torch.int64)
    for one in lines.pieces:
        signs = signs_of(one.words, len(one.factors), products.shape[1])
        found = products @ signs.T * one.factors.to(torch.float64)
        found += weights[:, None] * one.offsets.to(torch.float64)
        numbers = torch.arange(one.first, one.first + len(one.factors)).expand(queries, -1)
        order = torch.cat([scores, found], 1).sort(dim=1, descending=True, stable=True)
        scores = order.values[:, :k]
        ids = torch.cat([ids, numbers], 1).gather(1, order.indices[:, :k])
    return scores, ids


def signs_of(words: Tensor, count: int, bits: int) -> Tensor:
    """Return signs, float64 (count, bits), from tiles."""
    flat = words.transpose(1, 2).flatten(0, 1)[:count]
    held = flat.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32) & 1
    return held.flatten(1)[:, :bits].to(torch.float64) * 2 - 1
