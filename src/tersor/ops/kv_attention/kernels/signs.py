"""Codes of one bit, which stand for -1 and 1: four signs at a time look their sum up, in the 16 sums that they may have.

Scores take four signs of a token, for sixteen tokens at a time: a query makes the tables, once. Mixtures take the signs
of four tokens at one place, for sixteen places at a time: weights make the tables, once a block.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import ir

from tersor.ops.kv_attention.kernels import fours
from tersor.ops.kv_attention.kernels.rows import Rows
from tersor.ops.vectors import FLOAT, INT, INTS, LANES, LONG

FOUR = 4  # signs that are looked up together
SIGNS = 8  # of a byte
_SUMS = [[1.0 if place >> one & 1 else -1.0 for place in range(LANES)] for one in range(FOUR)]  # a sign in each table


def meet(v: Rows) -> None:
    """Write the scores of some rows, a multiple of sixteen; `near` is (fours of signs, queries, 16)."""
    if v.bytewise:
        fours.meet(v)
        return
    builder, queries, (words, _) = v.builder, v.queries, v.own
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


def gather(v: Rows) -> None:
    """Add the sums of some rows, a multiple of four, under weights to `out`, (vectors, signs of a byte, queries, 16)."""
    if v.bytewise:
        fours.gather(v)
        return
    builder, queries, (_, vectors) = v.builder, v.queries, v.own
    codes, _, count, stride = v.rows()
    out, tables = v.pointer(v.value(4, 0), FLOAT), v.pointer(v.value(4, 1), FLOAT)
    sets = builder.udiv(count, LONG(FOUR))
    with v.loop(sets) as turn:
        _write_tables(v, turn, v.at(tables, builder.mul(turn, LONG(queries * LANES))), queries)
    at_a_time = max(1, v.sums // (2 * queries))
    for vector, low in product(range(vectors), range(0, FOUR, at_a_time)):
        shifts = range(low, min(low + at_a_time, FOUR))
        places = [((vector * SIGNS + shift + half) * queries + query) * LANES
                  for shift in shifts for half in (0, FOUR) for query in range(queries)]
        sums = [v.room() for _ in places]
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(v.at(out, place)), room)
        with v.loop(sets) as turn:
            line = builder.add(builder.mul(builder.mul(turn, LONG(FOUR)), stride), LONG(vector * LANES))
            index = _fours(v, builder.add(codes, line), stride, shifts)
            for number, room in enumerate(sums):
                table = v.at(tables, builder.mul(builder.add(builder.mul(turn, LONG(queries)), LONG(number % queries)),
                                                 LONG(LANES)))
                v.store(v.add(v.load(room), v.look(v.load(table), index[number // queries])), room)
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(room), v.at(out, place))


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


__all__ = ["gather", "meet"]
