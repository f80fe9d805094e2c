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
from tersor.ops.code_scan.shapes import MORE, SIGNS_FROM, SOME_BOUNDS, SOME_QUERIES, SOME_ROWS, STEP, TILE, refusal
from tersor.ops.dispatch import take_reference

if TYPE_CHECKING:
    from tersor.ops.code_scan import Asked, Stack, Words

MOST_HALF = 14  # exponent of the largest product as float16
LEAST_UNIT = 2.0**-100


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """What bounds of scores are made of.

    With the largest factor `F` and offset `O`, no score exceeds `factor * (sum + step * whole + lost) + weight * offset
    + base + STEPS * (F * whole + O * |weight| + |base|) + TINY`.

    Attributes
    ----------
    whole : Tensor
        What no sum exceeds, float32 (queries,).
    step : float
        What sums may lose in roundings, of the whole.
    tables : Tensor or None
        float32 (queries, lookups, size); None where signs are multiplied.
    products : Tensor or None
        float16 (queries, signs), divided by `unit`; None where codes are looked up.
    unit, lost : Tensor or None
        float32 (queries,): that, and what products lose as float16.
    """

    whole: Tensor
    step: float
    tables: Tensor | None
    products: Tensor | None = None
    unit: Tensor | None = None
    lost: Tensor | None = None


def best(stack: Stack, asked: Asked, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows, (queries, k), on the processor; see the op."""
    tiles = len(stack.codes)
    take = min(tiles, k + max(MORE, k // 4))
    parts = [_best(stack, part, bounds_of(stack, part, terms_of(stack, part)), (k, take))
             for part in _some(asked, min(SOME_BOUNDS // tiles, SOME_ROWS // (TILE * take)))]
    return parts[0] if len(parts) == 1 else (torch.cat([part[0] for part in parts]),
                                             torch.cat([part[1] for part in parts]))


def within(stack: Stack, asked: Asked, floors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the scores and ids of all rows from a floor on, on the processor; see the op."""
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
        out += zip(scores.cpu().split(counts), ids.cpu().split(counts), strict=True)
    return out


def terms_of(stack: Stack, asked: Asked) -> Terms:
    """Return what bounds are made of, from what roundings may take at most."""
    products, words = asked.products, stack.words
    if products is not None and len(products) >= SIGNS_FROM:
        return _multiplied(products, words)
    if products is None or words is not None:
        whole = torch.linalg.vector_norm(asked.tables, math.inf, dim=2).sum(1)
    else:
        whole = torch.linalg.vector_norm(products, 1, dim=1)
    return Terms(whole.to(torch.float32), (asked.tables.shape[1] + 4) * STEP,
                 asked.tables.to(torch.float32).contiguous())


def _multiplied(products: Tensor, words: Words | None) -> Terms:
    """Return what bounds are made of where products are rounded to float16, and words are."""
    largest = torch.linalg.vector_norm(products, math.inf, dim=1)
    unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - MOST_HALF).clamp_min(LEAST_UNIT)
    scaled = products / unit[:, None]
    rounded = scaled.to(torch.float16)
    off = (scaled - rounded).abs()
    whole, lost = ((products.abs().sum(1), off.sum(1)) if words is None else
                   (products.abs() @ words.reach, off @ words.reach + rounded.to(torch.float64).abs() @ words.lost))
    whole, lost, unit = (one.to(torch.float32) for one in (whole, lost * unit, unit * (words.unit if words else 1)))
    return Terms(whole, (products.shape[1] + 16) * STEP, None, rounded, unit, lost)


def bounds_of(stack: Stack, asked: Asked, terms: Terms) -> Tensor:
    """Return what the scores of each tile's rows do not exceed, float32 (queries, tiles); minus infinity for none."""
    if _kernels(stack):
        from tersor.ops.code_scan import launch

        return launch.bounds(stack, asked, terms)
    return reference.bounds(stack, asked, terms)


def scores_of(stack: Stack, asked: Asked, queries: Tensor | None, tiles: Tensor) -> Tensor:
    """Return the scores of the rows of tiles: float64 (n, TILE).

    Parameters
    ----------
    queries : Tensor or None
        int64 (n,), who asks for each tile; None: `tiles` are those of each query, (queries, n / queries).
    tiles : Tensor
        int64.
    """
    if _kernels(stack):
        from tersor.ops.code_scan import launch

        return launch.scores(stack, asked, queries, tiles)
    return reference.scores(stack, asked, queries, tiles)


def _kernels(stack: Stack) -> bool:
    device = stack.codes.device
    return device.type == "cuda" and not take_reference("code_scan", refusal(torch.cuda.get_device_capability(device)))


def _some(asked: Asked, count: int) -> Iterator[Asked]:
    """Yield what is asked by so many queries at a time, at least one."""
    count = max(1, min(count, SOME_QUERIES))
    if len(asked.tables) <= count:
        yield asked
        return
    for start in range(0, len(asked.tables), count):
        yield asked.of(slice(start, start + count))


def _best(stack: Stack, asked: Asked, bounds: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the best of so many tiles of the largest bounds, and of more for queries that these do not settle."""
    k, take = sizes
    queries, tiles = bounds.shape
    if take == tiles:
        return _sorted(stack, asked, torch.arange(tiles, device=bounds.device).expand(bounds.shape), k)
    top = bounds.topk(take + 1)
    chosen = top.indices[:, :take].contiguous()
    found = scores_of(stack, asked, None, chosen).reshape(queries, -1).topk(k + 1)
    numbers = stack.ids[chosen].reshape(queries, -1).gather(1, found.indices)
    rest = top.values[:, take:].to(torch.float64)
    answer = torch.cat([found.values, numbers.view(torch.float64), rest], 1).cpu()  # one wait for the device
    scores, ids, rest = answer[:, :k].clone(), answer[:, k + 1 : 2 * k + 1].view(torch.int64).clone(), answer[:, -1]
    ids.masked_fill_(scores == -math.inf, -1)
    equal = ((answer[:, 1 : k + 1] == scores) & (scores > -math.inf)).any(1)
    still = (rest >= scores[:, -1]) & (rest > -math.inf)
    for unsettled, more in ((equal & ~still, take), (still, min(tiles, 8 * take))):
        for some in unsettled.nonzero().squeeze(1).split(max(1, SOME_ROWS // (TILE * more))) if unsettled.any() else ():
            near = some.to(bounds.device)
            scores[some], ids[some] = (_sorted(stack, asked.of(near), chosen[near], k) if more == take else
                                       _best(stack, asked.of(near), bounds[near], (k, more)))
    return scores, ids


def _sorted(stack: Stack, asked: Asked, chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows in chosen tiles, int64 (queries, n), some tiles at a time."""
    count, device = len(chosen), chosen.device
    scores = torch.full((count, k), -math.inf, dtype=torch.float64, device=device)
    ids = torch.full((count, k), -1, dtype=torch.int64, device=device)
    for tiles in chosen.split(max(1, SOME_ROWS // (TILE * count)), 1):
        found = scores_of(stack, asked, None, tiles.contiguous())
        together = torch.cat([scores, found.reshape(count, -1)], 1)
        held = torch.cat([ids, stack.ids[tiles].reshape(count, -1)], 1)
        order = reference.order_of(together, held)[:, :k]
        scores, ids = together.gather(1, order), held.gather(1, order)
    return scores.cpu(), ids.masked_fill(scores == -math.inf, -1).cpu()
