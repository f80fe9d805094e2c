"""Closed tokens as signs on the processor: four signs at a time look their sum up, in the 16 sums that they may have.

Scores take four signs of a token, for sixteen tokens at a time: a query makes the tables, once. Mixtures take the signs
of four tokens at one place, for sixteen places at a time: weights make the tables, once a block.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.kv_attention.kernels import lanes
from tersor.ops.kv_attention.kernels.lanes import SUMS, Rows
from tersor.ops.vectors import FLOAT, INT, INTS, LANES, LONG, how

FOUR = 4  # signs that are looked up together
SIGNS = 8  # of a byte
_SUMS = [[1.0 if place >> one & 1 else -1.0 for place in range(LANES)] for one in range(FOUR)]  # a sign in each table


@intrinsic(prefer_literal=True)
def _meet(typing: Any, how: Any, rows: Any, table: Any, near: Any, out: Any) -> Any:
    """Write the scores of some rows, a multiple of sixteen.

    Parameters
    ----------
    how : str
        Words of 32 signs a row, queries, bytes of a scale.
    rows : (address of codes, of scales, rows, bytes of a row)
    table : float32 (272,)
        Of which the last 256 are what scales of a byte stand for.
    near : (address of float32 (fours of signs, queries, 16),)
    out : (address of the first query's first score, numbers between queries)
    """
    del typing
    return types.void(how, rows, table, near, out), _write_meet


def _write_meet(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Rows(context, builder, signature, arguments, place_of_size=2)
    words, queries = (int(word) for word in v.said(0)[:2])
    codes, scales, count, stride = v.rows()
    near, out, step = v.pointer(v.value(3, 0), FLOAT), v.pointer(v.value(4, 0), FLOAT), v.value(4, 1)
    kind = ir.VectorType(INT, LANES * words)
    with v.loop(builder.udiv(count, LONG(LANES))) as turn:
        first = builder.mul(turn, LONG(LANES))
        held = v.load(v.pointer(builder.add(codes, builder.mul(first, stride)), INT), kind)
        sums = [v.all(0.0) for _ in range(queries)]
        for word in range(words):
            some = v.pick(held, held, range(word, LANES * words, words))
            for four in range(32 // FOUR):
                index = v.right(some, FOUR * four)
                for query in range(queries):
                    place = ((word * 32 // FOUR + four) * queries + query) * LANES
                    sums[query] = v.add(sums[query], v.look(v.load(v.at(near, place)), index))
        scale = v.scales(scales, first)
        for query, one in enumerate(sums):
            v.store(v.mul(one, scale), v.at(out, builder.add(first, builder.mul(step, LONG(query)))))
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def _gather(typing: Any, how: Any, rows: Any, table: Any, weights: Any, out: Any) -> Any:
    """Add the sums of some rows under weights to `out`; rows are a multiple of four.

    Parameters
    ----------
    how : str
        Vectors of sixteen bytes a row, queries, bytes of a scale.
    rows, table
        As of `_meet`.
    weights : (address of the first query's first weight, numbers between queries)
    out : (address of float32 (vectors, signs of a byte, queries, 16), of room for float32 (rows / 4, queries, 16))
    """
    del typing
    return types.void(how, rows, table, weights, out), _write_gather


def _write_gather(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Rows(context, builder, signature, arguments, place_of_size=2)
    vectors, queries = (int(word) for word in v.said(0)[:2])
    codes, _, count, stride = v.rows()
    out, tables = v.pointer(v.value(4, 0), FLOAT), v.pointer(v.value(4, 1), FLOAT)
    fours = builder.udiv(count, LONG(FOUR))
    with v.loop(fours) as turn:
        _write_tables(v, turn, v.at(tables, builder.mul(turn, LONG(queries * LANES))), queries)
    at_a_time = max(1, SUMS // (2 * queries))
    for vector, low in product(range(vectors), range(0, FOUR, at_a_time)):
        shifts = range(low, min(low + at_a_time, FOUR))
        places = [((vector * SIGNS + shift + half) * queries + query) * LANES
                  for shift in shifts for half in (0, FOUR) for query in range(queries)]
        sums = [v.room() for _ in places]
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(v.at(out, place)), room)
        with v.loop(fours) as turn:
            line = builder.add(builder.mul(builder.mul(turn, LONG(FOUR)), stride), LONG(vector * LANES))
            index = _fours(v, builder.add(codes, line), stride, shifts)
            for number, room in enumerate(sums):
                table = v.at(tables, builder.mul(builder.add(builder.mul(turn, LONG(queries)), LONG(number % queries)),
                                                 LONG(LANES)))
                v.store(v.add(v.load(room), v.look(v.load(table), index[number // queries])), room)
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(room), v.at(out, place))
    return context.get_dummy_value()


def _write_tables(v: Rows, turn: Any, table: Any, queries: int) -> None:
    """Write the sums that the signs of four tokens may have, weighed: one table a query."""
    weights, step = v.pointer(v.value(3, 0), FLOAT), v.value(3, 1)
    first, build = v.builder.mul(turn, LONG(FOUR)), v.builder
    scales = [v.scale(v.rows()[1], build.add(first, LONG(one))) for one in range(FOUR)]
    for query in range(queries):
        total = v.all(0.0)
        for one, scale in enumerate(scales):
            place = build.add(build.add(first, LONG(one)), build.mul(step, LONG(query)))
            share = v.all(build.fmul(build.load(v.at(weights, place)), scale))
            total = v.fma(share, ir.Constant(total.type, _SUMS[one]), total)
        v.store(total, v.at(table, query * LANES))


def _fours(v: Rows, line: Any, stride: Any, shifts: range) -> list[Any]:
    """Return the signs of four rows at places `shift` and `shift + 4` of bytes, in the four lowest bits of lanes."""
    build = v.builder
    whole = v.units(line, 1)
    for one in range(1, FOUR):
        more = v.units(build.add(line, build.mul(stride, LONG(one))), 1)
        whole = v.either(whole, v.left(more, SIGNS * one))
    found, mask = [], ir.Constant(INTS, [0x11111111] * LANES)
    for shift in shifts:
        bits = build.and_(v.right(whole, shift), mask)
        joined = v.either(v.either(bits, v.right(bits, 7)), v.either(v.right(bits, 14), v.right(bits, 21)))
        found += [joined, v.right(joined, FOUR)]
    return found


@cache
def scores(words: int, queries: int, size: int) -> Any:
    """Return the kernel of scores for so many words of signs a row, queries, and bytes of a scale."""
    made = how(words, queries, size, sources=(lanes.__file__,))

    @njit()
    def scores(addresses: Any, form: Any, table: Any, near: Any, out: Any, tasks: Any) -> None:
        """Write the scores of some heads of some sequences; as of `lanes.scores`, but `near` (tasks, fours, queries, 16)."""
        codes_at, scales_at, stride, heads, block, room, low, high = form
        width, each = near.size // near.shape[0] * 4, out.shape[1] * out.shape[2] * 4
        for task in range(tasks[0], tasks[1]):
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                row = (place % room * heads + task % heads) * block
                rows = base + codes_at + row * stride, base + scales_at + row * size, block, stride
                _meet(made, rows, table, (near.ctypes.data + task * width,),
                      (out.ctypes.data + task * each + (place - low) * block * 4, out.shape[2]))

    return scores


@cache
def mixture(vectors: int, queries: int, size: int) -> Any:
    """Return the kernel of sums under weights for so many vectors of bytes a row, queries, and bytes of a scale."""
    made = how(vectors, queries, size, sources=(lanes.__file__,))

    @njit()
    def mixture(addresses: Any, form: Any, table: Any, weights: Any, out: Any, tasks: Any) -> None:
        """Add the sums of some heads of some sequences to `out` (tasks, vectors, 8, queries, 16)."""
        codes_at, scales_at, stride, heads, block, room, low, high = form
        width, each = out.size // out.shape[0] * 4, weights.shape[1] * weights.shape[2] * 4
        tables = np.empty((block // 4, queries, 16), np.float32)
        for task in range(tasks[0], tasks[1]):
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                row = (place % room * heads + task % heads) * block
                rows = base + codes_at + row * stride, base + scales_at + row * size, block, stride
                _gather(made, rows, table, (weights.ctypes.data + task * each + (place - low) * block * 4,
                                            weights.shape[2]), (out.ctypes.data + task * width, tables.ctypes.data))

    return mixture


__all__ = ["mixture", "scores"]
