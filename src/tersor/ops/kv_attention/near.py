"""What few queries meet on the processor: tokens as codes of some kind, or dense ones.

Sums of values leave in the order of their kind, so that they are added up over all tokens before anything is put right.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.shapes import LANES
from tersor.ops.workers import passes, share

Span = tuple[int, int]


class Met(Protocol):
    """Tokens of all heads of all sequences; tasks are heads of sequences, in order.

    Attributes
    ----------
    tokens : int
    row_bytes : int
        Of a token.
    queries : tuple of int
        How many queries may meet a code at a time, falling.
    """

    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def row_bytes(self) -> int: ...  # noqa: D102
    @property
    def queries(self) -> tuple[int, ...]: ...  # noqa: D102

    def asked(self, rows: Tensor) -> tuple[np.ndarray, Tensor | None]:
        """Return queries, float32 (tasks, q, dim), as tokens meet them; what to add to scores, (tasks, q)."""
        ...

    def score(self, asked: np.ndarray, out: np.ndarray, at: int, span: Span) -> None:
        """Write the scores of some tasks to `out`, float32 (tasks of the span, q, any), from place `at` on."""
        ...

    def sums(self, tasks: int, queries: int) -> Tensor:
        """Return zeros, to which sums of values are added: float32 (tasks, …)."""
        ...

    def add(self, weights: np.ndarray, sums: np.ndarray, at: int, span: Span) -> None:
        """Add the sums of some tasks under weights, which lie as scores; of codes they are not kept."""
        ...

    def mixed(self, sums: Tensor, totals: Tensor) -> Tensor:
        """Return the mixtures (tasks, q, dim) that sums are, of weights that add up to `totals`, (tasks, q)."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Whole blocks of a side: `low` to `high` of `heads` heads, in blocks of `block` tokens.

    Attributes
    ----------
    room : int
        Blocks of a page.
    """

    heads: int
    block: int
    room: int
    low: int
    high: int

    @property
    def tokens(self) -> int:
        """Tokens of the blocks."""
        return (self.high - self.low) * self.block


def scores_of(met: Met, asked: Tensor) -> Tensor:
    """Return products of queries, float32 (batch, heads, q, dim), with the tokens: float32 (…, q, tokens)."""
    rows, found = asked.flatten(0, 1), []
    nbytes = len(rows) * met.tokens * met.row_bytes
    for first, count in passes(rows.shape[1], met.queries):
        near, shift = met.asked(rows[:, first : first + count])
        out = np.empty((len(rows), count, met.tokens), np.float32)
        share(len(rows), nbytes, lambda span, near=near, out=out: met.score(near, out[slice(*span)], 0, span))
        scores = torch.from_numpy(out)
        found.append(scores if shift is None else scores.add_(shift[..., None]))
    return torch.cat(found, 1).reshape(*asked.shape[:3], -1)


def mixture_of(met: Met, weights: Tensor) -> Tensor:
    """Return sums of the tokens under weights, float32 (batch, heads, q, tokens): float32 (…, q, dim)."""
    flat, found = weights.flatten(0, 1), []
    nbytes = len(flat) * met.tokens * met.row_bytes
    for first, count in passes(flat.shape[1], met.queries):
        some = flat[:, first : first + count].clone(memory_format=torch.contiguous_format)
        sums = met.sums(len(flat), count)
        near, added = some.numpy(), sums.numpy()
        share(len(flat), nbytes, lambda span, near=near, added=added: met.add(near[slice(*span)], added, 0, span))
        found.append(met.mixed(sums, some.sum(-1)))
    return torch.cat(found, 1).reshape(*weights.shape[:3], -1)


def turned(rows: Tensor, maps: Tensor, *, back: bool = False) -> Tensor:
    """Return rows (tasks, q, n) through the maps of their heads, (heads or 1, n, m), or `back` through (…, m, n)."""
    maps = maps.mT if back else maps
    if len(maps) == 1:
        return rows @ maps[0]
    heads = rows.unflatten(0, (-1, len(maps)))
    return (heads @ maps).flatten(0, 1)


def shifted(rows: Tensor, offset: Tensor) -> Tensor:
    """Return products of rows (tasks, q, dim) with the offsets of their heads, (heads or 1, dim): (tasks, q)."""
    return (rows.unflatten(0, (-1, len(offset))) @ offset[..., None]).flatten(0, 1)[..., 0]


def centred(rows: Tensor, totals: Tensor, offset: Tensor) -> Tensor:
    """Add to rows (tasks, q, dim) the offsets of their heads, (heads or 1, dim), times `totals`, (tasks, q)."""
    heads = (-1, len(offset))
    return (rows.unflatten(0, heads) + totals.unflatten(0, heads)[..., None] * offset[:, None]).flatten(0, 1)


def in_lanes(rows: Tensor, each: int, vectors: int) -> Tensor:
    """Return rows (tasks, q, n) in the order of units of `each` numbers: (tasks, vectors, each, q, 16)."""
    from tersor.ops.kv_attention.kernels import laying

    out = torch.empty(len(rows), vectors, each, rows.shape[1], LANES, device="cpu")
    laying.lay_units(rows.contiguous().numpy(), each, out.numpy())
    return out


def out_of_lanes(sums: Tensor, numbers: int) -> Tensor:
    """Return what `in_lanes` was given, of so many numbers."""
    from tersor.ops.kv_attention.kernels import laying

    out = torch.empty(len(sums), sums.shape[3], numbers, device="cpu")
    laying.lift_units(sums.numpy(), out.numpy())
    return out


__all__ = ["Blocks", "Met", "Span", "centred", "in_lanes", "mixture_of", "out_of_lanes", "scores_of", "shifted",
           "turned"]
