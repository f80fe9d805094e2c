"""Streams along outputs on the processor: a register holds the windows of 16 neighbouring columns.

The bits that enter the windows of a row lie side by side in a row of bits, so 16 of them are one word of 16 bits. Four
registers of windows are led down a tile of rows at a time: each of its rows of bits is then read 8 bytes at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from tersor.ops.vectors import INT, INTS, LANES, LONG
from tersor.ops.window_linear.kernels.gathers import Gathers

WIDE = 4  # registers of windows that are led down together
ROWS = 64  # of a tile: its bits and sums stay in the first cache, beside the table
SHORT, FLAGS = ir.IntType(16), ir.VectorType(ir.IntType(1), LANES)


def _down(blocks: int, vectors: int) -> Any:
    """Return an intrinsic that leads the windows of `16 * blocks` columns down some rows; `vectors` 0 only decodes."""

    @intrinsic
    def down(typing: Any, codes: Any, table: Any, met: Any, out: Any, ends: Any, offsets: Any, at: Any):
        """Add products of the columns to sums, or write numbers times scales.

        Parameters
        ----------
        met : float32, (vectors, columns), or the scales of rows, (rows,)
        out : float32, sums (rows, vectors, 16), or numbers (rows, columns)
        ends, offsets : int64 (numbers of a segment,)
            Bits that have entered after each number; where the table of its phase begins.
        at : (byte of the columns' bits in the first row of the circle, bytes of a row of bits, bits of the circle,
              first number, numbers, bits that have entered before, memory, mask, place in `met`, columns of `met`,
              place in `out`, step of `out`)
        """
        del typing
        return types.void(codes, table, met, out, ends, offsets, at), _write

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Gathers(context, builder, signature, arguments)
        codes, table, met, out, ends, offsets = (v.array(place) for place in range(6))
        base, stride, total, first, count, begin, memory, mask, place, columns, to, step = (
            v.value(6, i) for i in range(12))
        mask = builder.trunc(mask, INT)
        states = [v.room(INTS) for _ in range(blocks)]
        for state in states:
            v.store(ir.Constant(INTS, [0] * LANES), state)
        here = [[v.load(v.at(met, builder.add(builder.add(place, builder.mul(columns, LONG(vector))),
                                              LONG(block * LANES)))) for block in range(blocks)]
                for vector in range(vectors)]

        def enter(bit: Any) -> None:
            address = v.at(codes, builder.add(base, builder.mul(bit, stride)))
            for block, state in enumerate(states):
                flags = builder.bitcast(v.load(v.at(address, 2 * block), SHORT), FLAGS)
                v.store(v.either(v.left(v.load(state, INTS), 1), builder.zext(flags, INTS)), state)

        with v.loop(memory) as turn:
            bit = builder.add(builder.sub(begin, memory), turn)
            enter(builder.select(builder.icmp_signed("<", bit, LONG(0)), builder.add(bit, total), bit))
        entered = v.room(LONG)
        builder.store(begin, entered)
        with v.loop(count) as turn:
            number = builder.add(first, turn)
            end = v.number(ends, number)
            with v.turns(builder.load(entered), end) as bit:
                enter(bit)
            builder.store(end, entered)
            levels = v.at(table, v.number(offsets, number))
            found = [v.gather(levels, v.and_all(v.load(state, INTS), mask)) for state in states]
            if vectors:
                for vector in range(vectors):
                    sums = v.at(out, builder.add(builder.mul(turn, LONG(vectors * LANES)), LONG(vector * LANES)))
                    summed = v.load(sums)
                    for one, other in zip(found, here[vector], strict=True):
                        summed = v.fma(one, other, summed)
                    v.store(summed, sums)
            else:
                scale = v.all(v.number(met, builder.add(place, turn)))
                row = builder.add(to, builder.mul(turn, step))
                for block, one in enumerate(found):
                    v.store(v.mul(one, scale), v.at(out, builder.add(row, LONG(block * LANES))))
        return context.get_dummy_value()

    return down


@cache
def multiply(vectors: int) -> Any:
    """Return the kernel for so many vectors."""
    wide, one = _down(WIDE, vectors), _down(1, vectors)

    @numba.njit(nogil=True, boundscheck=False, cache=True)
    def run(codes: Any, stride: Any, table: Any, memory: Any, x: Any, y: Any, ends: Any, offsets: Any, tiles: Any,
            span: Any) -> None:
        """Write products of tiles of rows.

        Parameters
        ----------
        codes : uint8
            Rows of bits, of `stride` bytes, a multiple of 2.
        table : float32 (period * 2**memory,)
        x : float32 (vectors, 8 * stride)
            Past the columns that there are: 0.
        y : float32 (vectors, rows)
        ends, offsets
            See `_down`.
        tiles : int64 (tiles, 6)
            The row in `y`, rows (at most `ROWS`), the first row of bits of the circle, its bits, the first number in
            the segment, the bits that have entered before.
        span : (first, last)
            Tiles.
        """
        columns, mask = 8 * stride, (1 << memory) - 1
        sums = np.empty((ROWS, vectors, LANES), np.float32)
        for i in range(span[0], span[1]):
            row, count, first, total, number, begin = tiles[i]
            sums[:count] = 0
            base, column = first * stride, 0
            while column + WIDE * LANES <= columns:
                wide(codes, table, x, sums, ends, offsets, (base + column // 8, stride, total, number, count, begin,
                                                            memory, mask, column, columns, 0, 0))
                column += WIDE * LANES
            while column < columns:
                one(codes, table, x, sums, ends, offsets, (base + column // 8, stride, total, number, count, begin,
                                                           memory, mask, column, columns, 0, 0))
                column += LANES
            for turn in range(count):
                for vector in range(vectors):
                    total_sum = np.float32(0)
                    for lane in range(LANES):
                        total_sum += sums[turn, vector, lane]
                    y[vector, row + turn] = total_sum

    return run


_WIDE, _ONE = _down(WIDE, 0), _down(1, 0)


@numba.njit(nogil=True, boundscheck=False, cache=True)
def decode(codes: Any, stride: Any, table: Any, memory: Any, scales: Any, out: Any, ends: Any, offsets: Any, tiles: Any,
           span: Any) -> None:
    """Write numbers of tiles of rows, times the rows' scales, to `out`, float32 (rows, 8 * stride); see `multiply`."""
    columns, mask = 8 * stride, (1 << memory) - 1
    for i in range(span[0], span[1]):
        row, count, first, total, number, begin = tiles[i]
        base, column = first * stride, 0
        while column + WIDE * LANES <= columns:
            _WIDE(codes, table, scales, out, ends, offsets,
                  (base + column // 8, stride, total, number, count, begin, memory, mask, row, 0,
                   row * columns + column, columns))
            column += WIDE * LANES
        while column < columns:
            _ONE(codes, table, scales, out, ends, offsets,
                 (base + column // 8, stride, total, number, count, begin, memory, mask, row, 0,
                  row * columns + column, columns))
            column += LANES
