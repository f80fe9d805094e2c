"""Attention of few queries on the processor: all scores of a few heads, their weights in the same place, their sums.

Of four queries and 8,192 tokens scores are 128 kB, which the nearer caches hold. Each head is one thread's, and its
sums are made in one order.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.ops.kv_attention.dense import Dense
from tersor.ops.kv_attention.near import Met, Span
from tersor.ops.kv_attention.shapes import LANES, How
from tersor.ops.workers import passes, share

HELD = 1 << 17  # scores that a thread holds at a time, or those of one head


@dataclasses.dataclass(frozen=True, eq=False)
class Near:
    """Everything that queries attend to, in order: dense sinks, closed tokens, dense recent ones.

    Attributes
    ----------
    sinks, recent : (Tensor, Tensor)
        Keys and values, (batch, heads, tokens, dim).
    closed : (Met, Met)
        Keys and values as codes.
    """

    sinks: tuple[Tensor, Tensor]
    recent: tuple[Tensor, Tensor]
    closed: tuple[Met, Met]


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """Queries of all tasks, from number `first` on, as codes and dense tokens meet them.

    Attributes
    ----------
    shift : ndarray
        float32 (tasks, count): to be added to scores of codes.
    """

    first: int
    closed: np.ndarray
    dense: np.ndarray
    shift: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Sums:
    """Sums of values of all tasks, as they are added up.

    Attributes
    ----------
    totals : ndarray
        float32 (tasks, count, 2): of all weights, and of those of closed tokens.
    """

    closed: np.ndarray
    dense: np.ndarray
    totals: np.ndarray


class _Call:
    """One call of `attention`: `rows` are queries, float32 (tasks, q, dim), head by head of those that share a key."""

    def __init__(self, rows: Tensor, held: Near, how: How, queries: int) -> None:
        self._rows, self._causal, self._cap, self._queries = rows, how.causal, how.softcap or 0.0, queries
        self._closed, self._heads = held.closed, held.recent[0].shape[1]
        groups, closed, first = rows.shape[1] // queries, held.closed[0].tokens, held.sinks[0].shape[2]
        self._groups, self._span = groups, (first, first + closed)
        self._tokens = first + closed + held.recent[0].shape[2]
        self._dense = [(start, Dense.of(pair[0]), Dense.of(pair[1]))
                       for start, pair in ((0, held.sinks), (first + closed, held.recent)) if pair[0].shape[2]]
        self._nbytes = len(rows) * closed * sum(side.row_bytes for side in held.closed)
        self._bias = _bias(how.mask)
        self._idle = (np.full(self._heads * groups, -np.inf, np.float32) if how.s_aux is None
                      else how.s_aux.detach().to(torch.float32).contiguous().numpy())

    def attended(self, first: int, count: int) -> Tensor:
        """Return what some queries of each task get: (tasks, count, dim)."""
        some, (keys, values) = self._rows[:, first : first + count], self._closed
        near, shift = keys.asked(some)
        totals = torch.empty(len(some), count, 2, device="cpu")
        moved = np.zeros((len(some), count), np.float32) if shift is None else shift.contiguous().numpy()
        sums = values.sums(len(some), count)
        _, beside, more = self._dense[0] if self._dense else (0, None, None)
        dense, apart = (near, sums) if beside is None or more is None else (
            beside.asked(some)[0], more.sums(len(some), count))
        asked, found = _Asked(first, near, dense, moved), _Sums(sums.numpy(), apart.numpy(), totals.numpy())
        share(len(some), self._nbytes, lambda span: self._work(asked, found, span))
        mixed, whole = values.mixed(sums, totals[..., 1]), totals[..., :1]
        if more is not None:
            mixed = mixed.add_(more.mixed(apart, totals[..., 0]))
        return mixed.div_(whole.masked_fill_(whole == 0.0, 1.0))

    def _work(self, asked: _Asked, sums: _Sums, span: Span) -> None:
        """Do the heads of a share, some at a time."""
        from tersor.ops.kv_attention.kernels import softmax

        count, wide = asked.shift.shape[1], -(-self._tokens // LANES) * LANES
        each, (keys, values), (low, high) = max(1, HELD // (count * wide)), self._closed, self._span
        held = np.empty((min(each, span[1] - span[0]), count, wide), np.float32)
        for begin in range(*span, each):
            some = begin, min(begin + each, span[1])
            scores = held[: some[1] - begin]
            keys.score(asked.closed, scores, low, some)
            for start, near, _ in self._dense:
                near.score(asked.dense, scores, start, some)
            form = (begin, self._heads, self._groups, self._queries, asked.first, self._tokens, low, high, self._causal)
            softmax.soften(scores, form, asked.shift, self._cap, self._bias, self._idle, sums.totals)
            for start, _, far in self._dense:
                far.add(scores, sums.dense, start, some)
            values.add(scores, sums.closed, low, some)


def attention(query: Tensor, held: Near, how: How) -> Tensor:
    """Return attention, float32 (batch, query heads, queries, value dim); a query that sees nothing gets zeros.

    Parameters
    ----------
    query : Tensor
        (batch, query heads, queries, dim), a multiple of the heads held.
    held : Near
    how : How

    Raises
    ------
    CodecConfigError
        If a mask or sinks do not fit the queries.
    """
    batch, heads, queries, dim = query.shape
    _check(how, (batch, heads, queries))
    rows = (query.to(torch.float32) * how.scaling).reshape(batch * held.recent[0].shape[1], -1, dim)
    call = _Call(rows, held, how, queries)
    sizes = [size for size in held.closed[0].queries if size in held.closed[1].queries]
    found = [call.attended(first, count) for first, count in passes(rows.shape[1], sizes)]
    return (found[0] if len(found) == 1 else torch.cat(found, 1)).reshape(batch, heads, queries, -1)


def _check(how: How, shape: tuple[int, int, int]) -> None:
    """Raise where kernels would read behind a mask or behind logits of (batch, query heads, queries)."""
    if how.mask is not None and (how.mask.ndim != 4 or any(
            found not in (1, wanted) for found, wanted in zip(how.mask.shape, shape, strict=False))):
        raise CodecConfigError(f"an attention mask must be (batch or 1, query heads or 1, queries, tokens) of "
                               f"{shape}, found {tuple(how.mask.shape)}")
    if how.s_aux is not None and how.s_aux.shape != shape[1:2]:
        raise CodecConfigError(f"sinks must be a logit for each of {shape[1]} heads, found {tuple(how.s_aux.shape)}")


def _bias(mask: Tensor | None) -> np.ndarray:
    """Return what is added to scores, float32 (batch or 1, query heads or 1, queries, tokens); of no token: nothing."""
    if mask is None:
        return np.zeros((1, 1, 1, 0), np.float32)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device="cpu").masked_fill_(~mask, float("-inf"))
    return mask.detach().to(torch.float32).contiguous().numpy()


__all__ = ["Near", "attention"]
