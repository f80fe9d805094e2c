"""Streams along inputs on the processor: a register holds the windows of 16 rows at the same number.

Words of 16 rows are transposed, circle by circle. A window's bits lie side by side in its stream, the oldest first, so
two words, shifted, hold it: the table is looked up by the bits in that order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.vectors import INT, INTS, LANES, LONG
from tersor.ops.window_linear.kernels.gathers import Gathers, edition

WORD = 32
BLOCK = 4 * LANES  # bytes of a row that are transposed together


@intrinsic
def _fill(typing: Any, codes: Any, starts: Any, words: Any, at: Any, made: Any):
    """Write the words of 16 rows, transposed, from the second of `words` on.

    Parameters
    ----------
    at : (place in `starts`, byte of the circle in its row, blocks of 16 words)
    """
    del typing

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Gathers(context, builder, signature, arguments)
        codes, starts, words = (v.array(place) for place in range(3))
        place, byte, blocks = (v.value(3, i) for i in range(3))
        rows = [v.at(codes, builder.add(v.number(starts, builder.add(place, LONG(i))), byte)) for i in range(LANES)]
        with v.loop(blocks) as block:
            first = builder.mul(block, LONG(BLOCK))
            for i, column in enumerate(v.transposed([v.load(v.at(row, first), INTS) for row in rows])):
                turn = builder.add(builder.mul(block, LONG(LANES)), LONG(i + 1))
                v.store(column, v.at(words, builder.mul(turn, LONG(LANES))))
        return context.get_dummy_value()

    return types.void(codes, starts, words, at, made), _write


def _number(v: Gathers, words: Any, table: Any, marks: tuple[Any, Any], number: Any, mask: Any) -> Any:
    """Return the numbers of 16 rows at one place of a segment; `marks` as of `_along`."""
    builder = v.builder
    place = v.number(marks[0], number)
    low = builder.mul(builder.lshr(place, LONG(5)), LONG(LANES))
    held = [v.load(v.at(words, builder.add(low, LONG(i * LANES))), INTS) for i in (0, 1)]
    shift = v.all(builder.trunc(builder.and_(place, LONG(WORD - 1)), INT))
    window = v.and_all(v.between(*held, shift), mask)
    return v.gather(v.at(table, v.number(marks[1], number)), window)


@intrinsic
def _along(typing: Any, words: Any, table: Any, x: Any, sums: Any, marks: Any, at: Any, made: Any):
    """Add products of a segment of 16 rows with vectors to `sums`, float32 (vectors, 16).

    Parameters
    ----------
    x : tuple of float32 (width,)
    marks : two of int64 (numbers of a segment,)
        The bit of `words` at which a number's window begins; where the table of its phase begins.
    at : (numbers, mask, place in `x`)
    """
    del typing

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Gathers(context, builder, signature, arguments)
        words, table, sums = (v.array(place) for place in (0, 1, 3))
        both = v.array(4, 0), v.array(4, 1)
        count, mask, place = (v.value(5, i) for i in range(3))
        mask = builder.trunc(mask, INT)
        here = [v.at(v.array(2, vector), place) for vector in range(signature.args[2].count)]
        totals = [v.room() for _ in here]
        for vector, total in enumerate(totals):
            v.store(v.load(v.at(sums, vector * LANES)), total)
        with v.loop(count) as turn:
            found = _number(v, words, table, both, turn, mask)
            for x, total in zip(here, totals, strict=True):
                v.store(v.fma(found, v.all(v.number(x, turn)), v.load(total)), total)
        for vector, total in enumerate(totals):
            v.store(v.load(total), v.at(sums, vector * LANES))
        return context.get_dummy_value()

    return types.void(words, table, x, sums, marks, at, made), _write


@intrinsic
def _spell(typing: Any, words: Any, table: Any, lines: Any, out: Any, marks: Any, at: Any, made: Any):
    """Write the numbers of a segment of 16 rows, times the rows' scales.

    Parameters
    ----------
    lines : (scales, places)
        Of rows, float32 and int64: where they begin in `out`.
    marks
        As of `_along`.
    at : (numbers, at least 16, mask, place in `lines`, column)
    """
    del typing

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Gathers(context, builder, signature, arguments)
        words, table, out = (v.array(place) for place in (0, 1, 3))
        scales, to, both = v.array(2, 0), v.array(2, 1), (v.array(4, 0), v.array(4, 1))
        count, mask, place, column = (v.value(5, i) for i in range(4))
        mask, scale = builder.trunc(mask, INT), v.load(v.at(scales, place))
        rows = [v.at(out, builder.add(v.number(to, builder.add(place, LONG(i))), column)) for i in range(LANES)]
        blocks = builder.sdiv(builder.add(count, LONG(LANES - 1)), LONG(LANES))
        with v.loop(blocks) as block:
            first, last = builder.mul(block, LONG(LANES)), builder.sub(count, LONG(LANES))
            first = builder.select(builder.icmp_signed("<", first, last), first, last)  # the last two may overlap
            found = [_number(v, words, table, both, builder.add(first, LONG(i)), mask) for i in range(LANES)]
            turned = v.transposed([builder.bitcast(v.mul(one, scale), INTS) for one in found])
            for row, numbers in zip(rows, turned, strict=True):
                v.store(numbers, v.at(row, first))
        return context.get_dummy_value()

    return types.void(words, table, lines, out, marks, at, made), _write


@njit()
def _close(codes: Any, starts: Any, words: Any, place: Any, byte: Any, total: Any, memory: Any) -> None:
    """Write the last bits of 16 circles to the upper end of the first of `words`."""
    begin = total - memory
    low, high = begin >> 3, (total - 1) >> 3
    for lane in range(LANES):
        first, held = starts[place + lane] + byte, 0
        for i in range(low, high + 1):
            held |= np.int64(codes[first + i]) << 8 * (i - low)
        words[lane] = np.int32(held >> (begin & 7) << (WORD - memory) & 0xFFFFFFFF)


def _multiply(made: str) -> Any:
    @njit()
    def multiply(held: Any, x: Any, y: Any, marks: Any, parts: Any, span: Any) -> None:
        """Write products of tiles of 16 rows.

        Parameters
        ----------
        held : (codes, starts, table, memory)
            Codes, uint8, are streams of which every circle begins with a byte, with `BLOCK` bytes behind the last; rows
            begin at the bytes `starts`, int64 (16 * tiles,). The table, float32 (period * 2**memory,), is by windows with
            the oldest bit lowest.
        x : tuple of float32 (width,)
            Vectors. Kernels are compiled for as many as there are.
        y : float32 (vectors, 16 * tiles)
        marks
            See `_along`.
        parts : int64 (segments, 4)
            Byte of the circle in a row, its bits, first number, numbers.
        span : (first, last)
            Tiles.
        """
        codes, starts, table, memory = held
        words = np.empty((2 + parts[:, 1].max() // WORD + LANES) * LANES, np.int32)
        sums = np.empty(len(x) * LANES, np.float32)
        for tile in range(span[0], span[1]):
            sums[:] = 0
            for i in range(parts.shape[0]):
                byte, total, first, count = parts[i]
                _close(codes, starts, words, tile * LANES, byte, total, memory)
                _fill(codes, starts, words, (tile * LANES, byte, (total + 8 * BLOCK - 1) // (8 * BLOCK)), made)
                _along(words, table, x, sums, marks, (count, (1 << memory) - 1, first), made)
            for vector in range(len(x)):
                for lane in range(LANES):
                    y[vector, tile * LANES + lane] = sums[vector * LANES + lane]

    return multiply


def _decode(made: str) -> Any:
    @njit()
    def decode(held: Any, scales: Any, out: Any, to: Any, marks: Any, parts: Any, span: Any) -> None:
        """Write the numbers of tiles of 16 rows, times `scales`, to the places `to` of `out`; see `multiply`."""
        codes, starts, table, memory = held
        words = np.empty((2 + parts[:, 1].max() // WORD + LANES) * LANES, np.int32)
        for tile in range(span[0], span[1]):
            for i in range(parts.shape[0]):
                byte, total, first, count = parts[i]
                _close(codes, starts, words, tile * LANES, byte, total, memory)
                _fill(codes, starts, words, (tile * LANES, byte, (total + 8 * BLOCK - 1) // (8 * BLOCK)), made)
                _spell(words, table, (scales, to), out, marks, (count, (1 << memory) - 1, tile * LANES, first), made)

    return decode


multiply, decode = _multiply(edition()), _decode(edition())
