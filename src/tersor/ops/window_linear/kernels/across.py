"""Streams along outputs on the processor: a register holds the windows of 16 neighbouring columns.

The bits that enter the windows of a row lie side by side in a row of bits, so 16 of them are one word of 16 bits. Four
registers of windows are led down a tile of rows at a time: each of its rows of bits is then read 8 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.vectors import INT, INTS, LANES, LONG
from tersor.ops.window_linear.kernels.gathers import Gathers, edition

WIDE = 4  # registers of windows that are led down together
ROWS = 64  # of a tile: its bits and sums stay in the first cache, beside the table
SHORT, FLAGS = ir.IntType(16), ir.VectorType(ir.IntType(1), LANES)


def _down(blocks: int) -> Any:
    """Return an intrinsic that leads the windows of `16 * blocks` columns down some rows."""

    @intrinsic
    def down(typing: Any, codes: Any, table: Any, met: Any, out: Any, marks: Any, at: Any, made: Any):
        """Add products of the columns to sums, or write numbers times scales.

        Parameters
        ----------
        met : tuple of float32 (columns,), vectors; or the scales of rows, float32 (rows,)
        out : float32, sums (rows, vectors, 16), or numbers (rows, columns)
        marks : two of int64 (numbers of a segment,)
            Bits that have entered after each number; where the table of its phase begins.
        at : (byte of the columns' bits in the first row of the circle, bytes of a row of bits, bits of the circle,
              first number, numbers, bits that have entered before, memory, place in `met`, place in `out`, step of
              `out`)
        made : edition of the instructions
        """
        del typing
        return types.void(codes, table, met, out, marks, at, made), _write

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Gathers(context, builder, signature, arguments)
        table, ends, offsets = v.array(1), v.array(4, 0), v.array(4, 1)
        total, first, count, begin, memory = (v.value(5, i) for i in range(2, 7))
        mask = builder.sub(builder.shl(INT(1), builder.trunc(memory, INT)), INT(1))
        states = [v.room(INTS) for _ in range(blocks)]
        for state in states:
            v.store(ir.Constant(INTS, [0] * LANES), state)
        met = signature.args[2]
        take = _adding(v, blocks, met.count) if isinstance(met, types.UniTuple) else _writing(v)
        with v.loop(memory) as turn:
            bit = builder.add(builder.sub(begin, memory), turn)
            _enter(v, states, builder.select(builder.icmp_signed("<", bit, LONG(0)), builder.add(bit, total), bit))
        entered = v.room(LONG)
        builder.store(begin, entered)
        with v.loop(count) as turn:
            number = builder.add(first, turn)
            end = v.number(ends, number)
            with v.turns(builder.load(entered), end) as bit:
                _enter(v, states, bit)
            builder.store(end, entered)
            levels = v.at(table, v.number(offsets, number))
            take(turn, [v.gather(levels, v.and_all(v.load(state, INTS), mask)) for state in states])
        return context.get_dummy_value()

    return down


def _enter(v: Gathers, states: list[Any], bit: Any) -> None:
    """Shift a row of bits into windows."""
    builder = v.builder
    address = v.at(v.array(0), builder.add(v.value(5, 0), builder.mul(bit, v.value(5, 1))))
    for block, state in enumerate(states):
        flags = builder.bitcast(v.load(v.at(address, LANES // 8 * block), SHORT), FLAGS)
        v.store(v.either(v.left(v.load(state, INTS), 1), builder.zext(flags, INTS)), state)


def _adding(v: Gathers, blocks: int, vectors: int) -> Callable[[Any, list[Any]], None]:
    """Return what adds the numbers of a row, met by vectors, to its sums."""
    builder, out, place = v.builder, v.array(3), v.value(5, 7)
    here = [[v.load(v.at(v.at(v.array(2, vector), place), block * LANES)) for block in range(blocks)]
            for vector in range(vectors)]

    def take(turn: Any, found: list[Any]) -> None:
        for vector, others in enumerate(here):
            sums = v.at(out, builder.add(builder.mul(turn, LONG(vectors * LANES)), LONG(vector * LANES)))
            summed = v.load(sums)
            for one, other in zip(found, others, strict=True):
                summed = v.fma(one, other, summed)
            v.store(summed, sums)

    return take


def _writing(v: Gathers) -> Callable[[Any, list[Any]], None]:
    """Return what writes the numbers of a row, times its scale."""
    builder, scales, out = v.builder, v.array(2), v.array(3)
    place, to, step = (v.value(5, i) for i in (7, 8, 9))

    def take(turn: Any, found: list[Any]) -> None:
        scale, row = v.all(v.number(scales, builder.add(place, turn))), builder.add(to, builder.mul(turn, step))
        for block, one in enumerate(found):
            v.store(v.mul(one, scale), v.at(out, builder.add(row, LONG(block * LANES))))

    return take


_WIDE, _ONE = _down(WIDE), _down(1)


def _multiply(made: str) -> Any:
    @njit()
    def multiply(held: Any, x: Any, y: Any, marks: Any, tiles: Any, span: Any) -> None:
        """Write products of tiles of rows.

        Parameters
        ----------
        held : (codes, stride, table, memory)
            Codes, uint8, are rows of bits, of `stride` bytes, a multiple of 2; the table is float32 (period * 2**memory,).
        x : tuple of float32 (8 * stride,)
            Vectors; past the columns that there are: 0. Kernels are compiled for as many as there are.
        y : float32 (vectors, rows)
        marks
            See `_down`.
        tiles : int64 (tiles, 6)
            The row in `y`, rows (at most `ROWS`), the first row of bits of the circle, its bits, the first number in the
            segment, the bits that have entered before.
        span : (first, last)
            Tiles.
        """
        codes, stride, table, memory = held
        columns = 8 * stride
        many = columns // (WIDE * LANES) * WIDE * LANES
        sums = np.empty((ROWS, len(x), LANES), np.float32)
        for i in range(span[0], span[1]):
            row, count, first, total, number, begin = tiles[i]
            sums[:count] = 0
            base = first * stride
            for column in range(0, many, WIDE * LANES):
                at = (base + column // 8, stride, total, number, count, begin, memory, column, 0, 0)
                _WIDE(codes, table, x, sums, marks, at, made)
            for column in range(many, columns, LANES):
                at = (base + column // 8, stride, total, number, count, begin, memory, column, 0, 0)
                _ONE(codes, table, x, sums, marks, at, made)
            for turn in range(count):
                for vector in range(len(x)):
                    summed = np.float32(0)
                    for lane in range(LANES):
                        summed += sums[turn, vector, lane]
                    y[vector, row + turn] = summed

    return multiply


def _decode(made: str) -> Any:
    @njit()
    def decode(held: Any, scales: Any, out: Any, marks: Any, tiles: Any, span: Any) -> None:
        """Write numbers of tiles of rows, times the rows' scales, to `out`, float32 (rows, 8 * stride); see `multiply`."""
        codes, stride, table, memory = held
        columns = 8 * stride
        many = columns // (WIDE * LANES) * WIDE * LANES
        for i in range(span[0], span[1]):
            row, count, first, total, number, begin = tiles[i]
            base, to = first * stride, row * columns
            for column in range(0, many, WIDE * LANES):
                at = (base + column // 8, stride, total, number, count, begin, memory, row, to + column, columns)
                _WIDE(codes, table, scales, out, marks, at, made)
            for column in range(many, columns, LANES):
                at = (base + column // 8, stride, total, number, count, begin, memory, row, to + column, columns)
                _ONE(codes, table, scales, out, marks, at, made)

    return decode


multiply, decode = _multiply(edition()), _decode(edition())
