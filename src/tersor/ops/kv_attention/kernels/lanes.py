"""Closed tokens on the processor, as codes that meet queries or weights at once: `levels` and `signs` say how."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.kv_attention.kernels import dense, fours, levels, rows, signs
from tersor.ops.kv_attention.kernels.rows import Rows
from tersor.ops.vectors import how

_KINDS = {"levels": levels, "signs": signs, "dense": dense}


@intrinsic(prefer_literal=True)
def _meet(typing: Any, how: Any, rows: Any, table: Any, near: Any, out: Any) -> Any:
    """Write the scores of some rows.

    Parameters
    ----------
    how : str
        Kind of codes, bytes of a scale, queries; of levels the bits of a code and the vectors of units a row, of signs
        the words of 32 and the vectors of bytes.
    rows : (address of codes, of scales, rows, bytes of a row)
    table : float32 (272,)
        Levels, then what scales of a byte stand for.
    near : (address of float32 queries, as the kind wants them,)
    out : (address of the first query's first score, numbers between queries)
    """
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Rows(context, builder, signature, arguments)
        _KINDS[v.said(0)[0]].meet(v)
        return context.get_dummy_value()

    return types.void(how, rows, table, near, out), write


@intrinsic(prefer_literal=True)
def _gather(typing: Any, how: Any, rows: Any, table: Any, weights: Any, out: Any) -> Any:
    """Add the sums of some rows under weights.

    Parameters
    ----------
    how, rows, table
        As of `_meet`.
    weights : (address of the first query's first weight, numbers between queries)
    out : (address of float32 sums, as the kind makes them; of room for float32 (rows, 4 queries + 16 vectors of bytes of a row))
    """
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Rows(context, builder, signature, arguments)
        _KINDS[v.said(0)[0]].gather(v)
        return context.get_dummy_value()

    return types.void(how, rows, table, weights, out), write


def _how(kind: str, own: tuple[int, int], queries: int, size: int) -> str:
    sources = tuple(str(module.__file__) for module in (dense, fours, levels, rows, signs))
    return how(kind, size, queries, ",".join(map(str, own)), sources=sources)


@cache
def scores(kind: str, own: tuple[int, int], queries: int, size: int) -> Any:
    """Return the kernel of scores for codes of a kind, queries, and bytes of a scale."""
    made = _how(kind, own, queries, size)

    @njit()
    def scores(addresses: Any, form: Any, table: Any, near: Any, out: Any, tasks: Any) -> None:
        """Write the scores of some heads of some sequences.

        Parameters
        ----------
        addresses : int64 (pages, sequences)
        form : (codes_at, scales_at, bytes of a row, heads, tokens of a block, blocks of a page, first block, last)
        table : float32 (272,)
        near : float32 (tasks, …), as the kind wants queries
        out : float32 (tasks of the span, queries, at least as many tokens)
        tasks : (place of the first token in `out`, first, last)
            Of all heads of all sequences.
        """
        codes_at, scales_at, stride, heads, block, room, low, high = form
        width, each = near.size // near.shape[0] * 4, out.shape[1] * out.shape[2] * 4
        for task in range(tasks[1], tasks[2]):
            first = out.ctypes.data + (task - tasks[1]) * each + tasks[0] * 4
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                row = (place % room * heads + task % heads) * block
                rows = base + codes_at + row * stride, base + scales_at + row * size, block, stride
                _meet(made, rows, table, (near.ctypes.data + task * width,),
                      (first + (place - low) * block * 4, out.shape[2]))

    return scores


@cache
def mixture(kind: str, own: tuple[int, int], queries: int, size: int) -> Any:
    """Return the kernel of sums under weights for codes of a kind, queries, and bytes of a scale."""
    made, vectors = _how(kind, own, queries, size), own[1]

    @njit()
    def mixture(addresses: Any, form: Any, table: Any, weights: Any, out: Any, tasks: Any) -> None:
        """Add the sums of some heads of some sequences to `out`, (tasks, …); weights lie as `out` of `scores`."""
        codes_at, scales_at, stride, heads, block, room, low, high = form
        width, each = out.size // out.shape[0] * 4, weights.shape[1] * weights.shape[2] * 4
        tables = np.empty(block * (4 * queries + 16 * vectors), np.float32)
        for task in range(tasks[1], tasks[2]):
            first = weights.ctypes.data + (task - tasks[1]) * each + tasks[0] * 4
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                row = (place % room * heads + task % heads) * block
                rows = base + codes_at + row * stride, base + scales_at + row * size, block, stride
                _gather(made, rows, table, (first + (place - low) * block * 4, weights.shape[2]),
                        (out.ctypes.data + task * width, tables.ctypes.data))

    return mixture


@cache
def dense_scores(own: tuple[int, int], queries: int) -> Any:
    """Return the kernel of scores for dense tokens: bytes of a number, vectors of a token, queries."""
    made = _how("dense", own, queries, 2)

    @njit()
    def dense_scores(addresses: Any, form: Any, near: Any, out: Any, tasks: Any) -> None:
        """Write the scores of some heads of some sequences.

        Parameters
        ----------
        addresses : int64 (tasks,)
        form : (tokens, bytes from one to the next, place of the first in `out`)
        near : float32 (tasks, vectors, 1, queries, 16)
        out : float32 (tasks of the span, queries, at least as many tokens)
        tasks : (first, last)
        """
        tokens, stride, at = form
        width, each = near.size // near.shape[0] * 4, out.shape[1] * out.shape[2] * 4
        for task in range(tasks[0], tasks[1]):
            _meet(made, (addresses[task], addresses[task], tokens, stride), near, (near.ctypes.data + task * width,),
                  (out.ctypes.data + (task - tasks[0]) * each + at * 4, out.shape[2]))

    return dense_scores


@cache
def dense_mixture(own: tuple[int, int], queries: int) -> Any:
    """Return the kernel of sums under weights for dense tokens; see `dense_scores`."""
    made = _how("dense", own, queries, 2)

    @njit()
    def dense_mixture(addresses: Any, form: Any, weights: Any, out: Any, tasks: Any) -> None:
        """Add the sums of some heads of some sequences to `out`, (tasks, …); weights lie as `out` of `dense_scores`."""
        tokens, stride, at = form
        width, each = out.size // out.shape[0] * 4, weights.shape[1] * weights.shape[2] * 4
        for task in range(tasks[0], tasks[1]):
            _gather(made, (addresses[task], addresses[task], tokens, stride), out,
                    (weights.ctypes.data + (task - tasks[0]) * each + at * 4, weights.shape[2]),
                    (out.ctypes.data + task * width, 0))

    return dense_mixture


__all__ = ["dense_mixture", "dense_scores", "mixture", "scores"]
