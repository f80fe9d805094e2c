"""The meaning of a scan, in plain torch and float64; and what a device does of it, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.code_scan.shapes import NIBBLE, SOME_ROWS, STEPS, TILE, TINY

if TYPE_CHECKING:
    from tersor.ops.code_scan import Asked, Lines, Rows, Stack
    from tersor.ops.code_scan.tiles import Terms


def best(lines: Lines, asked: Asked, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows, (queries, k); see the op."""
    queries = len(asked.tables)
    scores = torch.full((queries, k), -math.inf, dtype=torch.float64)
    ids = torch.full((queries, k), -1, dtype=torch.int64)
    for found, numbers in _scores(lines, asked):
        together = torch.cat([scores, found], 1)
        held = torch.cat([ids, numbers.expand(queries, -1)], 1)
        order = order_of(together, held)[:, :k]
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
        order = order_of(found[None, inside], ids[None, inside])[0]
        out.append((found[inside][order], ids[inside][order]))
    return out


def _scores(lines: Lines, asked: Asked) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the scores of every piece's rows, (queries, count), minus infinity where not asked for; and ids."""
    bases = asked.based()
    for place, one in enumerate(lines.pieces):
        codes = codes_of(one, asked.tables.shape[2])
        sums = torch.zeros(len(asked.tables), len(codes), dtype=torch.float64)
        for lookup in range(codes.shape[1]):
            sums += asked.tables[:, lookup][:, codes[:, lookup]]
        weights = asked.weights[:, place if asked.weights.shape[1] > 1 else 0, None]
        found = sums * one.factors.to(torch.float64) + weights * one.offsets.to(torch.float64)
        if bases is not None:
            found += bases[:, place, None]
        if asked.masks is not None:
            found.masked_fill_(asked.masks[place] == 0, -math.inf)
        yield found, one.ids


def codes_of(rows: Rows, size: int) -> Tensor:
    """Return a row's codes, int64 (count, lookups)."""
    return torch.stack([codes.flatten()[: len(rows.factors)] for codes in _lookups(rows.codes, size)], 1)


def _lookups(codes: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the codes of each lookup, int64 (tiles, TILE): two of a byte where tables are of 16 numbers."""
    for column in codes.unbind(1):
        wide = column.to(torch.int64) & 0xFFFF if column.dtype == torch.int16 else column.to(torch.int64)
        yield from (wide & 15, wide >> 4) if size == NIBBLE else (wide,)


def bounds(stack: Stack, asked: Asked, terms: Terms) -> Tensor:
    """Return what the scores of each tile's rows do not exceed, float32 (queries, tiles), from float32 tables."""
    queries, _, size = asked.tables.shape
    tables, (factor, offset) = asked.tables.to(torch.float32), stack.peaks
    out = torch.empty(queries, len(stack.codes), device=stack.codes.device)
    whole = terms.whole[:, None, None]
    slack = terms.step * whole + (0 if terms.lost is None else terms.lost[:, None, None])
    step, bases = max(1, SOME_ROWS // (TILE * queries)), asked.based()
    there = stack.there if asked.masks is None else asked.masks[0]
    for first in range(0, len(stack.codes), step):
        some = slice(first, first + step)
        sums = torch.zeros(queries, len(stack.codes[some]), TILE, device=out.device)
        for lookup, codes in enumerate(_lookups(stack.codes[some], size)):
            sums += tables[:, lookup][:, codes]
        found = stack.factors[some] * (sums + slack)
        weights = _by_piece(asked.weights, stack.pieces[some])
        found += weights * stack.offsets[some] + (STEPS * (factor * whole + offset * weights.abs()) + TINY)
        if bases is not None:
            own = _by_piece(bases, stack.pieces[some])
            found += own + STEPS * own.abs().nan_to_num(posinf=0.0)
        out[:, some] = found.masked_fill_(there[some] == 0, -math.inf).amax(2)
    return out


def scores(stack: Stack, asked: Asked, queries: Tensor | None, tiles: Tensor) -> Tensor:
    """Return the scores of the rows of tiles, float64 (n, TILE); see `tiles.scores_of`."""
    if queries is None:
        queries = torch.arange(len(tiles), device=tiles.device).repeat_interleave(tiles.shape[1])
        tiles = tiles.reshape(-1)
    sums = torch.zeros(len(tiles), TILE, dtype=torch.float64, device=stack.codes.device)
    for lookup, codes in enumerate(_lookups(stack.codes[tiles], asked.tables.shape[2])):
        sums += asked.tables[queries, lookup].gather(1, codes)
    pieces = stack.pieces[tiles].to(torch.int64)
    weights = asked.weights[queries, pieces if asked.weights.shape[1] > 1 else 0, None]
    found = sums * stack.factors[tiles].to(torch.float64) + weights * stack.offsets[tiles].to(torch.float64)
    bases = asked.based()
    if bases is not None:
        found += bases[queries, pieces, None]
    there = stack.there if asked.masks is None else asked.masks[0]
    return found.masked_fill_(there[tiles] == 0, -math.inf)


def _by_piece(values: Tensor, pieces: Tensor) -> Tensor:
    """Return values of pieces, or of all, (queries, pieces), as those of tiles: float32 (queries, tiles, 1)."""
    by_tile = values.expand(-1, len(pieces)) if values.shape[1] == 1 else values[:, pieces.to(torch.int64)]
    return by_tile.unsqueeze(2).to(torch.float32)


def order_of(scores: Tensor, ids: Tensor) -> Tensor:
    """Return the order by falling scores, and among equals by rising ids."""
    first = ids.argsort(dim=1, stable=True)
    return first.gather(1, scores.gather(1, first).argsort(dim=1, descending=True, stable=True))
