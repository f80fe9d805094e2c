"""Scores of queries with the vectors that an index holds, whatever the magnitude of either.

Squares of numbers near `2**-70` are nothing in float32, so what is compared is divided by powers of two first, which
changes no digit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tersor.numerics.kmeans import times_power
from tersor.ops import code_scan
from tersor.ops.dispatch import compiled_allowed, log_once
from tersor.payload.scales import reciprocal
from tersor.vectors.alone import nearest
from tersor.vectors.checks import CPU
from tersor.vectors.frames import laid, lines, masked, stack
from tersor.vectors.held import Block, Held
from tersor.vectors.nearest import WORST, Best
from tersor.vectors.scanned import is_scanned

CHUNK_QUERIES = 256
DEVICE_QUERIES = 4096  # that a device is given at a time, at most
SOME_TABLES = 1 << 25  # numbers of their tables, and of lists
SOME_SCORES = 1 << 26  # of decoded vectors, which are held at a time on a device


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """Which vectors a search looks at.

    Attributes
    ----------
    metric : str
    allowed : Tensor or None
        bool (n,), in the order in which vectors were added; None: all.
    probes : int
        Lists that are looked into, where there are lists.
    device : torch.device
        Where scores are computed; what is found comes back to the processor.
    """

    metric: str
    allowed: Tensor | None = None
    probes: int = 1
    device: torch.device = CPU

    def of(self, place: slice) -> Wanted:
        """Return what is looked at among some of the vectors."""
        return self if self.allowed is None else dataclasses.replace(self, allowed=self.allowed[place])


@dataclasses.dataclass(frozen=True, eq=False)
class _Posed:
    """Queries as codes meet them, and the way back to distances.

    Attributes
    ----------
    queries : Tensor
        float32 (n, dim).
    size : int
        Vectors are divided by `2**size`.
    power : Tensor or None
        Squared norms of queries, by L2; float64 (n, 1).
    exponent : int
        Of the power of two that scores are multiplied by.
    """

    queries: Tensor
    size: int
    power: Tensor | None
    exponent: int

    def distances(self, scores: Tensor) -> Tensor:
        """Return what users see: squared distances by L2, else scores; float32 (n, k), finite where there is none.

        By NumPy: a search of one query is mostly calls, and those are shorter.
        """
        found, least = scores.numpy(), -WORST
        if self.power is not None:
            found, least = self.power.numpy() - 2 * found, 0
        return torch.from_numpy(np.ldexp(found, self.exponent).clip(least, WORST).astype(np.float32))

    def floors(self, radius: float) -> Tensor:
        """Return the scores of a distance, float64 (n,)."""
        value = math.ldexp(radius, -self.exponent)
        if self.power is None:
            return torch.full((len(self.queries),), value, dtype=torch.float64)
        return (self.power.squeeze(1) - value) / 2


def best_of(held: Held, queries: Tensor, k: int, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Return scores or squared distances, and ids, (queries, k), of the best vectors for float32 queries (n, dim)."""
    if not len(queries):
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
    scans = _scans(held, wanted)
    if scans and len(queries) == 1 and wanted.allowed is None and wanted.device == CPU:
        found = nearest(held, queries, k, wanted.metric)
        if found is not None:
            return found
    posed = _posed(held, queries, wanted.metric)
    if scans:
        scores, ids = _scanned(held, posed, wanted, k)
    else:
        best = Best(len(queries), k, wanted.device)
        for numbers, found in _together(_scores(held, posed, wanted), wanted.device):
            best.offer(found, numbers)
        scores, ids = best.scores, best.ids
    return posed.distances(scores.cpu()), ids.cpu()


def at_once(held: Held, wanted: Wanted) -> int:
    """Return how many queries are answered at a time."""
    if wanted.device == CPU or not _scans(held, wanted):
        return CHUNK_QUERIES
    numbers = held.meeting.numbers + (len(held.lists) if held.lists else 0)
    return max(1, min(DEVICE_QUERIES, SOME_TABLES // numbers))


def within(held: Held, queries: Tensor, radius: float, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
    """Return scores or distances and ids of all vectors that lie within a radius, or score as much: of each query."""
    posed = _posed(held, queries, wanted.metric)
    floors = posed.floors(radius)
    if _scans(held, wanted):
        found = _inside(held, posed, wanted, floors)
    else:
        found = _joined([_reaching(scores, block.ids, floors) for block, scores in _scores(held, posed, wanted)])
    out = []
    for i, (scores, ids) in enumerate(found):
        own = dataclasses.replace(posed, power=None if posed.power is None else posed.power[i : i + 1])
        out.append((own.distances(scores[None])[0], ids))
    return out


def _posed(held: Held, queries: Tensor, metric: str) -> _Posed:
    """Return queries, scaled, less what mean there is on both sides by L2.

    `|q - x|² = |q|² - 2 (q x - |x|² / 2)`, all divided by the square of a power of two beyond all norms.
    """
    given = queries.numpy()
    if metric == "l2":
        mean = held.lists.origin if held.lists else held.blocks[0].mean
        given = given if mean is None else given - mean.numpy()
    exponent = math.frexp(float(np.abs(given).max()))[1]
    if metric == "l2":
        size = max(exponent, math.frexp(held.longest)[1])
        scaled = times_power(given, -size)
        power = np.square(scaled, dtype=np.float64).sum(1, keepdims=True)
        return _Posed(torch.from_numpy(scaled), size, torch.from_numpy(power), 2 * size)
    unit = torch.from_numpy(times_power(given, -exponent))
    if metric == "cosine":
        return _Posed(unit * reciprocal(torch.linalg.vector_norm(unit, dim=1, keepdim=True)), 0, None, 0)
    return _Posed(unit, 0, None, exponent)


def _scans(held: Held, wanted: Wanted) -> bool:
    """Tell whether codes are scanned, and not multiplied; where a device must decode them, says so once."""
    scanned = is_scanned(held.blocks[0].core.codec)
    if wanted.device == CPU:
        return scanned and compiled_allowed("code_scan")
    if not scanned:
        log_once("code_scan", f"codes of '{held.blocks[0].core.codec}' are decoded block by block in every search; "
                              "signs of trellis codes and words of product codes are not")
    return scanned


def _reaching(scores: Tensor, ids: Tensor, floors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the scores and ids of what reaches a floor, of each query, on the processor."""
    wide = scores.to(torch.float64)
    query, place = ((wide >= floors.to(wide.device)[:, None]) & (wide > -math.inf)).nonzero(as_tuple=True)
    counts = query.bincount(minlength=len(scores)).tolist()
    return list(zip(wide[query, place].cpu().split(counts), ids[place].cpu().split(counts), strict=True))


def _joined(parts: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Return what parts have found of each query, best first, and of equal scores the least id first."""
    out = []
    for own in zip(*parts, strict=True):
        ids, by_id = torch.cat([part[1] for part in own]).sort()
        scores, best = torch.cat([part[0] for part in own])[by_id].sort(descending=True, stable=True)
        out.append((scores, ids[best]))
    return out


def _scanned(held: Held, posed: _Posed, wanted: Wanted, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best, (queries, k); block by block where codes are mapped."""
    if not held.mapped:
        scores, ids = code_scan.best(_rows(held, posed, wanted), _asked(held, posed, wanted), k)
        return scores.cpu(), ids.cpu()
    parts = [_scanned(alone, posed, wanted.of(place), k) for place, alone in held.alone()]
    scores, ids = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)
    by_id = ids.argsort(dim=1, stable=True)
    order = by_id.gather(1, scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True))[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def _inside(held: Held, posed: _Posed, wanted: Wanted, floors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the scores and ids of all from a floor on, of each query; block by block where codes are mapped."""
    if not held.mapped:
        found = code_scan.within(_rows(held, posed, wanted), _asked(held, posed, wanted), floors.to(wanted.device))
        return [(scores.cpu(), ids.cpu()) for scores, ids in found]
    return _joined([_inside(alone, posed, wanted.of(place), floors) for place, alone in held.alone()])


def _rows(held: Held, posed: _Posed, wanted: Wanted) -> code_scan.Lines | code_scan.Stack:
    if wanted.device == CPU:
        return lines(held, wanted.metric, posed.size)
    return stack(held, wanted.metric, posed.size, wanted.device)


def _asked(held: Held, posed: _Posed, wanted: Wanted) -> code_scan.Asked:
    """Return what a scan is asked for; see `frames.lines` for what its rows have."""
    whole, queries, metric = laid(held), posed.queries, wanted.metric
    shared = _shared(held, posed, wanted)
    visits = None
    if whole.pieces is not None:
        pieces = whole.pieces.to(wanted.device)
        visits, shared = _probed(held, posed, wanted)[:, pieces], shared[:, pieces]
    elif metric == "ip":
        shared = shared.expand(-1, len(whole.counts))
    bases = shared if metric == "ip" or (visits is not None and metric == "l2") else None
    weights = shared if metric == "cosine" else torch.ones(len(queries), 1, dtype=torch.float64, device=wanted.device)
    masks = None
    if wanted.allowed is not None and wanted.device == CPU:
        masks = tuple(part.contiguous() for part in whole.ordered(wanted.allowed.to(torch.uint8)))
    elif wanted.allowed is not None:
        masks = (masked(held, wanted.allowed, wanted.device),)
    if wanted.device == CPU:
        return code_scan.Asked(held.meeting.tables(queries), weights, visits, bases, masks)
    tables, products = held.meeting.tables_on(queries, wanted.device)
    return code_scan.Asked(tables, weights, visits, bases, masks, products)


def _probed(held: Held, posed: _Posed, wanted: Wanted) -> Tensor:
    """Return which lists are looked into, bool (queries, lists)."""
    assert held.lists is not None
    queries = times_power(posed.queries, posed.size).to(wanted.device)
    return held.lists.on(wanted.device).probed(queries, wanted.probes, wanted.metric)


def _shared(held: Held, posed: _Posed, wanted: Wanted) -> Tensor:
    """Return the products of queries with what vectors have in common: float64 (queries, lists), or (queries, 1)."""
    mean, queries, around = held.blocks[0].mean, posed.queries, wanted.metric == "l2"
    own = torch.zeros(len(queries), 1, dtype=torch.float64)
    if mean is not None and not (held.lists is None and around):
        own = queries.to(torch.float64) @ mean.to(torch.float64)[:, None]
    own = own.to(wanted.device)
    if held.lists is None:
        return own
    return (held.lists.on(wanted.device).products(queries.to(wanted.device), around) + own) * 2.0**-posed.size


def _scores(held: Held, posed: _Posed, wanted: Wanted) -> Iterator[tuple[Block, Tensor]]:
    """Yield each block and its scores, float32 (queries, n), minus infinity where not wanted."""
    metric, shared = wanted.metric, _shared(held, posed, wanted).to(torch.float32)
    probed = _probed(held, posed, wanted) if held.lists else None
    queries = times_power(posed.queries, -posed.size).to(wanted.device)
    for first, own in held.placed():
        own.norms(around=metric == "l2")  # on the processor, once: so they are the same on every device
        block = own.on(wanted.device)
        found = block.core.matmul(queries) if block is own else queries @ block.core.decode().T
        if block.places is not None and probed is not None:
            places = block.places.to(torch.int64)
            found += shared[:, places]
            found.masked_fill_(~probed[:, places], -math.inf)
        elif metric != "l2":
            found += shared
        if metric == "l2":
            found.sub_(times_power(block.norms(around=True), -posed.size).square_() / 2)
        elif metric == "cosine":
            found.mul_(reciprocal(block.norms()))
        if wanted.allowed is not None:
            found.masked_fill_(~wanted.allowed[first : first + len(block)].to(found.device), -math.inf)
        yield block, found


def _together(parts: Iterator[tuple[Block, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and scores; on a device those of many blocks at a time, as calls take longer than what they do."""
    ids, scores, count = [], [], 0
    for block, found in parts:
        ids.append(block.ids)
        scores.append(found)
        count += found.numel()
        if device == CPU or count >= SOME_SCORES:
            yield _cat(ids, 0), _cat(scores, 1)
            ids, scores, count = [], [], 0
    if ids:
        yield _cat(ids, 0), _cat(scores, 1)


def _cat(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
