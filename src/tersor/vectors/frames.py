"""A set as a scan reads it: pieces of rows that lie together, one a block, or, with lists, one a list."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from tersor.numerics.kmeans import times_power
from tersor.ops.code_scan import Lines, Rows, Stack, laid_out
from tersor.ops.code_scan.shapes import TILE
from tersor.payload.scales import reciprocal
from tersor.vectors.held import Block, Held
from tersor.vectors.scanned import codes_of, scales_of


@dataclasses.dataclass(frozen=True, eq=False)
class Laid:
    """Codes in tiles, and what goes with their rows.

    Attributes
    ----------
    codes : tuple of Tensor
        A piece's tiles; see `Rows`.
    order : Tensor
        The place of every row among all vectors, int64 (n,), piece after piece: within one, rows of like scores.
    counts : tuple of int
        Rows of each piece.
    pieces : Tensor or None
        The list that each piece is, int64; None without lists.
    scales, ids : Tensor
        float32 and int64 (n,).
    """

    codes: tuple[Tensor, ...]
    order: Tensor
    counts: tuple[int, ...]
    pieces: Tensor | None
    scales: Tensor
    ids: Tensor

    def ordered(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return values of all vectors, as they were added, as those of each piece's rows."""
        return values[self.order].split(self.counts)


def laid(held: Held) -> Laid:
    """Return the codes in tiles, kept."""
    found = held.made.get("laid")
    if found is None:
        held.made["laid"] = found = _by_lists(held) if held.lists else _by_blocks(held)
    return found


def lines(held: Held, metric: str, size: int) -> Lines:
    """Return all rows as a scan reads them, kept for every metric until another size is asked for.

    Parameters
    ----------
    held : Held
    metric : str
        Scores are inner products of what the mean or the centroid leaves, such products less half the squared norm, or
        cosines, whose offsets are the inverse norms: the share of the mean or the centroid in them.
    size : int
        Vectors are divided by `2**size`.
    """
    found = held.made.get(metric)
    if found is not None and found[0] == size:
        return found[1]
    whole = laid(held)
    factors, offsets = (one.split(whole.counts) for one in _numbers(held, whole, metric, size))
    held.made[metric] = found = size, Lines(tuple(Rows(*one) for one in zip(
        whole.codes, factors, offsets, whole.ids.split(whole.counts), strict=True)))
    return found[1]


def stack(held: Held, metric: str, size: int, device: torch.device) -> Stack:
    """Return all rows as a scan on a device reads them, kept as `lines` are; metrics share codes and ids."""
    found = held.made.get((metric, device))
    if found is not None and found[0] == size:
        return found[1]
    shared = held.made.get(device)
    if shared is None:
        held.made[device] = shared = _Tiled.of(laid(held), device)
    factors, offsets = _numbers(held, laid(held), metric, size)
    made = Stack(shared.codes, shared.spread(factors), shared.spread(offsets), shared.ids, shared.there, shared.pieces,
                 (float(factors.max()), float(offsets.abs().max())), held.meeting.words_on(device))
    held.made[metric, device] = size, made
    return made


def masked(held: Held, allowed: Tensor, device: torch.device) -> Tensor:
    """Return which rows of a stack are allowed, uint8 (tiles, TILE), of bool (n,) in the order of addition."""
    shared: _Tiled = held.made[device]
    return shared.spread(allowed[laid(held).order].to(torch.uint8))


@dataclasses.dataclass(frozen=True, eq=False)
class _Tiled:
    """What stacks of all metrics have in common, and the place of each row there, int64 (n,), piece after piece."""

    codes: Tensor
    ids: Tensor
    there: Tensor
    pieces: Tensor
    places: Tensor

    @classmethod
    def of(cls, whole: Laid, device: torch.device) -> Self:
        """Return codes on a device."""
        counts = torch.tensor(whole.counts)
        tiles = -(-counts // TILE)
        starts = (tiles.cumsum(0) - tiles) * TILE - (counts.cumsum(0) - counts)
        places = (torch.arange(int(counts.sum())) + starts.repeat_interleave(counts)).to(device)
        pieces = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(tiles).to(device)
        codes = torch.cat(whole.codes).to(device)
        none = torch.zeros(len(pieces), TILE, dtype=torch.uint8, device=device)
        bare = cls(codes, none, none, pieces, places)
        there = bare.spread(torch.ones(len(places), dtype=torch.uint8))
        return dataclasses.replace(bare, ids=bare.spread(whole.ids), there=there)

    def spread(self, values: Tensor) -> Tensor:
        """Return values of rows, (n,), piece after piece, as those of tiles, (tiles, TILE), 0 where there is no row."""
        out = torch.zeros(len(self.pieces) * TILE, dtype=values.dtype, device=self.places.device)
        return out.scatter_(0, self.places, values.to(out.device)).reshape(-1, TILE)


def _numbers(held: Held, whole: Laid, metric: str, size: int) -> tuple[Tensor, Tensor]:
    """Return factors and offsets of all rows, float32 (n,), piece after piece; see `lines`."""
    factors = times_power(whole.scales, -size)
    if metric == "l2":
        norms = torch.cat([block.norms(around=True) for block in held.blocks])[whole.order]
        return factors, times_power(norms, -size).square() / -2
    if metric == "cosine":
        offsets = reciprocal(torch.cat([block.norms() for block in held.blocks])[whole.order])
        return whole.scales * offsets, offsets
    return factors, torch.zeros_like(factors)


def _by_blocks(held: Held) -> Laid:
    parts = [_tiles(block) for block in held.blocks]
    codes, order, scales, ids = zip(*parts, strict=True)
    starts = [first for first, _ in held.placed()]
    whole = torch.cat([own + first for own, first in zip(order, starts, strict=True)])
    return Laid(codes, whole, tuple(len(block) for block in held.blocks), None, torch.cat(scales), torch.cat(ids))


def _tiles(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a block's codes in tiles, in what order its rows lie there, and their scales and ids, kept."""
    found = block.made.get("tiles")
    if found is None:
        scales = scales_of(block.core)
        order = _alike(scales, block.norms(around=True), (len(scales),))
        block.made["tiles"] = found = laid_out(codes_of(block.core)[order]), order, scales[order], block.ids[order]
    return found


def _alike(scales: Tensor, norms: Tensor, counts: Sequence[int]) -> Tensor:
    """Return an order of rows in which those of like scores lie together, so that one bound fits all rows of a tile.

    Rows of each piece, of which there are so many, are sorted by scale, and runs of them by norm.
    """
    found, first = [], 0
    for count in counts:
        rows = slice(first, first + count)
        by_norm, run = norms[rows].argsort(stable=True), TILE * math.isqrt(-(-count // TILE))
        by_scale = by_norm[scales[rows][by_norm].argsort(stable=True)]
        runs = torch.empty_like(by_scale)
        runs[by_scale] = torch.arange(count) // max(1, run)
        found.append(by_norm[runs[by_norm].argsort(stable=True)] + first)
        first += count
    return torch.cat(found)


def _by_lists(held: Held) -> Laid:
    """Return the rows of each list together, from a tile's first place on."""
    assert held.lists is not None
    places = torch.cat([block.places for block in held.blocks if block.places is not None]).to(torch.int64)
    order, counts = places.argsort(stable=True), places.bincount(minlength=len(held.lists))
    scales = torch.cat([scales_of(block.core) for block in held.blocks])
    norms = torch.cat([block.norms(around=True) for block in held.blocks])
    order = order[_alike(scales[order], norms[order], counts.tolist())]
    filled = counts.nonzero().squeeze(1)
    tiles = -(-counts // TILE)
    starts, rows = (tiles.cumsum(0) - tiles) * TILE, counts.cumsum(0) - counts
    sorted_places = places[order]
    target = starts[sorted_places] + torch.arange(len(order)) - rows[sorted_places]
    first = codes_of(held.blocks[0].core)
    wide = torch.zeros(int(tiles.sum()) * TILE, first.shape[1], dtype=first.dtype)
    back = torch.empty_like(target)
    back[order] = target
    for start, block in held.placed():
        wide[back[start : start + len(block)]] = codes_of(block.core)
    whole = laid_out(wide).split(tiles[filled].tolist())
    return Laid(whole, order, tuple(counts[filled].tolist()), filled, scales[order], held.ids[order])
