"""The meaning of a scan, in plain torch and float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.code_scan.shapes import NIBBLE

if TYPE_CHECKING:
    from tersor.ops.code_scan import Asked, Lines, Rows


def best(lines: Lines, asked: Asked, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows, (queries, k); see the op."""
    queries = len(asked.tables)
    scores = torch.full((queries, k), -math.inf, dtype=torch.float64)
    ids = torch.full((queries, k), -1, dtype=torch.int64)
    for found, numbers in _scores(lines, asked):
        together = torch.cat([scores, found], 1)
        held = torch.cat([ids, numbers.expand(queries, -1)], 1)
        order = _order(together, held)[:, :k]
        scores, ids = together.gather(1, order), held.gather(1, order)
    return scores, ids.masked_fill(scores == -math.inf, -1)


def within(lines: Lines, asked: Asked, floors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the scores and ids of all rows from a floor on; see the op."""
    parts = list(_scores(lines, asked))
    scores = torch.cat([part[0] for part in parts], 1)
    ids = torch.cat([part[1] for part in parts])
    out = []
    for found, floor in zip(scores, floors, strict=True):
        inside = ((found >= floor) & (found > -math.inf)).nonzero().squeeze(1)
        order = _order(found[None, inside], ids[None, inside])[0]
        out.append((found[inside][order], ids[inside][order]))
    return out


def _scores(lines: Lines, asked: Asked) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the scores of every piece's rows, (queries, count), minus infinity where not asked for; and ids."""
    for place, one in enumerate(lines.pieces):
        codes = codes_of(one, asked.tables.shape[2])
        sums = torch.zeros(len(asked.tables), len(codes), dtype=torch.float64)
        for lookup in range(codes.shape[1]):
            sums += asked.tables[:, lookup][:, codes[:, lookup]]
        weights = asked.weights[:, place if asked.weights.shape[1] > 1 else 0, None]
        found = sums * one.factors.to(torch.float64) + weights * one.offsets.to(torch.float64)
        if asked.bases is not None:
            found += asked.bases[:, place, None]
        if asked.visits is not None:
            found.masked_fill_(~asked.visits[:, place, None], -math.inf)
        if asked.masks is not None:
            found.masked_fill_(asked.masks[place] == 0, -math.inf)
        yield found, one.ids


def codes_of(rows: Rows, size: int) -> Tensor:
    """Return a row's codes, int64 (count, lookups)."""
    flat = rows.codes.transpose(1, 2).flatten(0, 1)[: len(rows.factors)].to(torch.int64)
    flat = flat & 0xFFFF if rows.codes.dtype == torch.int16 else flat
    return torch.stack([flat & 15, flat >> 4], 2).flatten(1) if size == NIBBLE else flat


def _order(scores: Tensor, ids: Tensor) -> Tensor:
    """Return the order by falling scores, and among equals by rising ids."""
    first = ids.argsort(dim=1, stable=True)
    return first.gather(1, scores.gather(1, first).argsort(dim=1, descending=True, stable=True))
