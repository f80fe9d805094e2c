"""The scan on a device: bounds of the scores in every tile first, then float64 for the tiles of the largest bounds.

A bound is certain, so what is found is what float64 finds: no tile is left out whose bound reaches the k-th best score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.code_scan import reference
from tersor.ops.code_scan.shapes import MORE, SIGNS_FROM, SOME_BOUNDS, SOME_ROWS, TILE, refusal
from tersor.ops.dispatch import take_reference

if TYPE_CHECKING:
    from tersor.ops.code_scan import Asked, Stack

STEP32, STEP22 = 2.0**-23, 2.0**-22  # of a sum of float32, and of one that tensor cores cut off
TINY = 2.0**-120  # what float32 may lose below its least normal number, many times over
MOST_HALF = 14  # exponent of the largest product as float16


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """What bounds of scores are made of.

    Attributes
    ----------
    numbers : Tensor
        float32 (queries, 3): what is added to a sum for its roundings, what to a score, and the unit of `products`.
    tables : Tensor
        float32 (queries, lookups, size).
    products : Tensor or None
        float16 (queries, signs), divided by the unit; None where codes are looked up.
    """

    numbers: Tensor
    tables: Tensor
    products: Tensor | None


def best(stack: Stack, asked: Asked, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows, (queries, k); see the op."""
    tiles = len(stack.codes)
    take = min(tiles, k + max(MORE, k // 4))
    parts = [_best(stack, part, terms_of(stack, part), None, (k, take))
             for part in _some(asked, min(SOME_BOUNDS // tiles, 4 * SOME_ROWS // (TILE * take)))]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def within(stack: Stack, asked: Asked, floors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the scores and ids of all rows from a floor on; see the op."""
    out, first = [], 0
    for part in _some(asked, SOME_BOUNDS // len(stack.codes)):
        own = floors[first : first + len(part.tables)]
        first += len(own)
        bounds = bounds_of(stack, part, terms_of(stack, part))
        query, tile = ((bounds >= own[:, None]) & (bounds > -math.inf)).nonzero(as_tuple=True)
        found = [(query[:0], own[:0], query[:0])]
        for start in range(0, len(query), SOME_ROWS // TILE):
            some = slice(start, start + SOME_ROWS // TILE)
            scores = scores_of(stack, part, query[some], tile[some])
            pair, row = ((scores >= own[query[some], None]) & (scores > -math.inf)).nonzero(as_tuple=True)
            found.append((query[some][pair], scores[pair, row], stack.ids[tile[some][pair], row]))
        query, scores, ids = (torch.cat(one) for one in zip(*found, strict=True))
        order = ids.argsort(stable=True)
        order = order[scores[order].argsort(descending=True, stable=True)]
        order = order[query[order].argsort(stable=True)]
        query, scores, ids = query[order], scores[order], ids[order]
        counts = query.bincount(minlength=len(own)).tolist()
        out += zip(scores.split(counts), ids.split(counts), strict=True)
    return out


def terms_of(stack: Stack, asked: Asked) -> Terms:
    """Return what bounds are made of, from what roundings may take at most."""
    (factor, offset), lookups = stack.peaks, asked.tables.shape[1]
    whole = asked.tables.abs().amax(2).sum(1)
    products, unit = None, torch.ones_like(whole)
    slack = (lookups + 4) * STEP32 * whole
    if asked.products is not None and len(asked.tables) >= SIGNS_FROM:
        largest = asked.products.abs().amax(1, keepdim=True)
        unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - MOST_HALF)
        scaled = asked.products / unit
        products = scaled.to(torch.float16)
        rounded = ((scaled - products).abs().sum(1, keepdim=True) * unit).squeeze(1)
        slack, unit = slack + rounded + (4 * lookups + 8) * STEP22 * whole, unit.squeeze(1)
    most = factor * (whole + slack) + offset * asked.weights.abs().amax(1)
    if asked.bases is not None:
        most = most + asked.bases.abs().nan_to_num(posinf=0.0).amax(1)
    numbers = torch.stack([slack, 2 * STEP22 * most + TINY, unit], 1)
    return Terms(numbers.to(torch.float32), asked.tables.to(torch.float32), products)


def bounds_of(stack: Stack, asked: Asked, terms: Terms) -> Tensor:
    """Return what the scores of each tile's rows do not exceed, float32 (queries, tiles); minus infinity for none."""
    if _kernels(stack):
        from tersor.ops.code_scan import launch

        return launch.bounds(stack, asked, terms)
    return reference.bounds(stack, asked, terms)


def scores_of(stack: Stack, asked: Asked, queries: Tensor, tiles: Tensor) -> Tensor:
    """Return the scores of the rows of tiles, one for one query each: float64 (n, TILE) of int64 (n,)."""
    if _kernels(stack):
        from tersor.ops.code_scan import launch

        return launch.scores(stack, asked, queries, tiles)
    return reference.scores(stack, asked, queries, tiles)


def _kernels(stack: Stack) -> bool:
    device = stack.codes.device
    return device.type == "cuda" and not take_reference("code_scan", refusal(torch.cuda.get_device_capability(device)))


def _some(asked: Asked, count: int) -> Iterator[Asked]:
    """Yield what is asked by so many queries at a time, at least one."""
    if len(asked.tables) <= count:
        yield asked
        return
    for start in range(0, len(asked.tables), max(1, count)):
        yield asked.of(slice(start, start + max(1, count)))


def _best(stack: Stack, asked: Asked, terms: Terms, bounds: Tensor | None, sizes: tuple[int, int]
          ) -> tuple[Tensor, Tensor]:
    """Return the best of some tiles first, and of more for queries that these do not settle."""
    k, take = sizes
    bounds = bounds_of(stack, asked, terms) if bounds is None else bounds
    if take == bounds.shape[1]:
        chosen = torch.arange(take, device=bounds.device).expand(bounds.shape)
        return _among(stack, asked, chosen, k)
    top = bounds.topk(take + 1)
    scores, ids = _among(stack, asked, top.indices[:, :take], k)
    rest = top.values[:, take]
    still = ((rest >= scores[:, -1]) & (rest > -math.inf)).nonzero().squeeze(1)
    if len(still):
        more = min(bounds.shape[1], 8 * take)
        parts = [_best(stack, asked.of(some), terms, bounds[some], (k, more))
                 for some in still.split(max(1, 4 * SOME_ROWS // (TILE * more)))]
        scores[still], ids[still] = (torch.cat(one) for one in zip(*parts, strict=True))
    return scores, ids


def _among(stack: Stack, asked: Asked, chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows in chosen tiles, int64 (queries, n): (queries, k)."""
    count, device = len(chosen), chosen.device
    scores = torch.full((count, k), -math.inf, dtype=torch.float64, device=device)
    ids = torch.full((count, k), -1, dtype=torch.int64, device=device)
    query = torch.arange(count, device=device)
    for tiles in chosen.split(max(1, SOME_ROWS // (TILE * count)), 1):
        found = scores_of(stack, asked, query.repeat_interleave(tiles.shape[1]), tiles.reshape(-1))
        together = torch.cat([scores, found.reshape(count, -1)], 1)
        held = torch.cat([ids, stack.ids[tiles].reshape(count, -1)], 1)
        order = reference.order_of(together, held)[:, :k]
        scores, ids = together.gather(1, order), held.gather(1, order)
    return scores, ids.masked_fill(scores == -math.inf, -1)
