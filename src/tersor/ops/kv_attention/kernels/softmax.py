"""From scores to weights on the processor, where they lie: caps, masks, and exponentials of sixteen numbers at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.kv_attention.kernels.rows import Addressed
from tersor.ops.vectors import FLOAT, FLOATS, INTS, LANES, LONG

LEAST = -87.0  # e to this is the last number that is not rounded to a denormal one: what is less is taken for nothing
_LOG2E = 1.4426950408889634
_LN2 = (0.693359375, -2.12194440e-4)  # in two parts, so that a multiple of the first is exact
_ROUND = 12582912.0  # 1.5 2**23: a float32 that this is added to is rounded to a whole number, in its lowest bits
_TAYLOR = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # within ln(2) / 2 of 0 the seventh term is below 2**-22.9


def _power(v: Addressed, number: Any) -> Any:
    """Return e to sixteen numbers of at most 88; NaN stays such."""
    builder = v.builder
    below = builder.fcmp_ordered("<", number, v.all(LEAST))
    held = builder.select(below, v.all(LEAST), number)
    moved = v.fma(held, v.all(_LOG2E), v.all(_ROUND))
    whole = v.sub(moved, v.all(_ROUND))
    rest = v.fma(whole, v.all(-_LN2[1]), v.fma(whole, v.all(-_LN2[0]), held))
    total = v.all(_TAYLOR[0])
    for factor in _TAYLOR[1:]:
        total = v.fma(total, rest, v.all(factor))
    bits = builder.add(builder.bitcast(moved, INTS), ir.Constant(INTS, [127 - 0x4B400000] * LANES))
    return builder.select(below, v.all(0.0), v.mul(total, builder.bitcast(v.left(bits, 23), FLOATS)))


@intrinsic
def _highest(typing: Any, address: Any, vectors: Any) -> Any:
    """Return the highest of some vectors' numbers, float32; NaN is none."""
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Addressed(context, builder, signature, arguments)
        first, room = v.pointer(arguments[0], FLOAT), v.room()
        v.store(v.all(float("-inf")), room)
        with v.loop(arguments[1]) as turn:
            v.store(v.higher(v.load(v.at(first, builder.mul(turn, LONG(LANES)))), v.load(room)), room)
        return v.highest(v.load(room))

    return types.float32(address, vectors), write


@intrinsic
def _exponentiate(typing: Any, address: Any, vectors: Any, base: Any) -> Any:
    """Put e to what numbers are above a base in their places; return the sum, float32."""
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Addressed(context, builder, signature, arguments)
        first, room, below = v.pointer(arguments[0], FLOAT), v.room(), v.all(arguments[2])
        v.store(v.all(0.0), room)
        with v.loop(arguments[1]) as turn:
            place = v.at(first, builder.mul(turn, LONG(LANES)))
            found = _power(v, v.sub(v.load(place), below))
            v.store(found, place)
            v.store(v.add(v.load(room), found), room)
        return v.total(v.load(room))

    return types.float32(address, vectors, types.float32), write


@intrinsic
def _cap(typing: Any, address: Any, vectors: Any, cap: Any) -> Any:
    """Put `cap tanh(number / cap)` in the places of numbers."""
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Addressed(context, builder, signature, arguments)
        first, most = v.pointer(arguments[0], FLOAT), v.all(arguments[2])
        with v.loop(arguments[1]) as turn:
            place = v.at(first, builder.mul(turn, LONG(LANES)))
            number = builder.fdiv(v.load(place), most)
            below = builder.fcmp_ordered("<", number, v.all(0.0))
            size = builder.select(below, builder.fneg(number), number)
            small = _power(v, v.mul(size, v.all(-2.0)))
            found = builder.fdiv(v.sub(v.all(1.0), small), v.add(v.all(1.0), small))
            v.store(v.mul(most, builder.select(below, builder.fneg(found), found)), place)
        return context.get_dummy_value()

    return types.void(address, vectors, types.float32), write


@njit()
def soften(scores: Any, form: Any, shift: Any, cap: float, bias: Any, idle: Any, totals: Any) -> None:
    """Turn scores of some heads of some sequences to weights, e to what they are above the highest of their row.

    Parameters
    ----------
    scores : float32 (tasks of the span, queries, tokens, up to a multiple of 16)
    form : (first task, key heads, heads that share a key, queries of a head, first query, tokens, first and last closed
        token, whether queries see only what comes before them)
        Queries are counted head by head of those that share a key.
    shift : float32 (tasks, queries)
        To be added to scores of closed tokens.
    cap : float32
        0: none.
    bias : float32 (sequences or 1, query heads or 1, queries of a head or 1, tokens)
        To be added; of no token: none.
    idle : float32 (query heads,)
        Scores of what has no value.
    totals : float32 (tasks, queries, 2)
        Sums of all weights, and of those of closed tokens, to be written.
    """
    begin, heads, groups, each, first, tokens, low, high, causal = form
    vectors = scores.shape[2] // 16
    for one in range(scores.shape[0]):
        task = begin + one
        sequence, head = task // heads, task % heads * groups
        for query in range(scores.shape[1]):
            row, place, number = scores[one, query], (first + query) % each, head + (first + query) // each
            address, more = row.ctypes.data, shift[task, query]
            if more != 0:
                for token in range(low, high):
                    row[token] += more
            if cap > 0:
                _cap(address, vectors, cap)
            if bias.shape[3]:
                line = bias[sequence if bias.shape[0] > 1 else 0, number if bias.shape[1] > 1 else 0,
                            place if bias.shape[2] > 1 else 0]
                for token in range(tokens):
                    row[token] += line[token]
            row[tokens - each + place + 1 if causal else tokens :] = -np.inf
            highest = max(_highest(address, vectors), idle[number])
            base = np.float32(0) if highest == -np.inf else highest
            total, dense = _exponentiate(address, vectors, base), np.float32(0)
            for token in range(low):
                dense += row[token]
            for token in range(high, tokens):
                dense += row[token]
            totals[task, query, 0] = total + np.exp(idle[number] - base)
            totals[task, query, 1] = total - dense


__all__ = ["soften"]
