"""Codes of 1 and 2 bits on the processor: four bits of a row look up what they add to the product.

For every four bits of a row, what they stand for times what they meet has 16 values, a register's table; each is one
lookup, an addition and a shift for 16 rows, whatever the levels. Rows lie one after another, so words of 16 rows are
transposed first. Two times 16 rows share a table.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.extending import intrinsic

from tersor.ops.vectors import INTS, LANES, LONG, Vectors

ROWS = 2 * LANES  # of a tile
WORDS = LANES  # of 32 bits that are transposed together
LOOKUPS = 8  # of a word
CHAINS = 2  # sums that the lookups of a word take turns in: additions of one wait for each other


def _tile(vectors: int) -> Any:
    """Return an intrinsic that multiplies a tile of rows by so many vectors."""

    @intrinsic
    def tile(typing: Any, codes: Any, at: Any, tables: Any, y: Any):
        """Write products of `ROWS` rows.

        Parameters
        ----------
        at : (byte of the first row, bytes between rows, first row, rows of `y`, blocks of `WORDS` words)
        tables, y
            See `multiply`.
        """
        del typing
        return types.void(codes, at, tables, y), _write

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature, arguments)
        codes, tables, y = (v.array(place) for place in (0, 2, 3))
        first, stride, row, rows, blocks = (v.value(1, i) for i in range(5))
        sums = [[[v.room() for _ in range(CHAINS)] for _ in range(vectors)] for _ in range(ROWS // LANES)]
        for room in (room for half in sums for chains in half for room in chains):
            v.store(v.all(0.0), room)
        words = v.room(INTS, ROWS // LANES * WORDS)
        with v.loop(blocks) as block:
            start = builder.add(first, builder.mul(block, LONG(4 * WORDS)))
            for half in range(ROWS // LANES):
                lines = [builder.add(start, builder.mul(stride, LONG(half * LANES + i))) for i in range(LANES)]
                for i, column in enumerate(v.transposed([v.load(v.at(codes, line), INTS) for line in lines])):
                    v.store(column, v.at(words, half * WORDS + i))
            with v.loop(LONG(WORDS)) as word:
                place = builder.add(builder.mul(block, LONG(WORDS)), word)
                held = [v.load(v.at(words, builder.add(word, LONG(half * WORDS))), INTS)
                        for half in range(ROWS // LANES)]
                for j in range(LOOKUPS):
                    index = [v.right(one, 4 * j) for one in held]
                    for number in range(vectors):
                        offset = builder.mul(place, LONG(LOOKUPS * vectors * LANES))
                        table = v.load(v.at(tables, builder.add(offset, LONG((j * vectors + number) * LANES))))
                        for half, one in enumerate(index):
                            room = sums[half][number][j % CHAINS]
                            v.store(v.add(v.load(room), v.look(table, one)), room)
        for half in range(ROWS // LANES):
            for number in range(vectors):
                total = v.load(sums[half][number][0])
                for room in sums[half][number][1:]:
                    total = v.add(total, v.load(room))
                place = builder.add(builder.mul(rows, LONG(number)), builder.add(row, LONG(half * LANES)))
                v.store(total, v.at(y, place))
        return context.get_dummy_value()

    return tile


def _multiply(vectors: int) -> Any:
    tile = _tile(vectors)

    @numba.njit(nogil=True, boundscheck=False, cache=True)
    def multiply(codes: Any, stride: Any, tables: Any, y: Any, tiles: Any) -> None:
        """Write the products of tiles of rows.

        Parameters
        ----------
        codes : uint8 (rows of `stride` bytes and `4 * WORDS` more,)
        tables : float32 (words * LOOKUPS, vectors, 16)
            Of all words of a row, to a multiple of `WORDS`; those past the end are 0.
        y : float32 (vectors, rows)
        tiles : (first, last)
        """
        rows, blocks = y.shape[1], tables.shape[0] // (WORDS * LOOKUPS)
        for i in range(tiles[0], tiles[1]):
            tile(codes, (i * ROWS * stride, stride, i * ROWS, rows, blocks), tables, y)

    return multiply


MULTIPLY = {vectors: _multiply(vectors) for vectors in (1, 2, 4)}


def _entries(codes: int) -> Any:
    """Return an intrinsic that writes the tables of one vector whose codes come in so many a table."""

    @intrinsic
    def entries(typing: Any, x: Any, first: Any, patterns: Any, tables: Any, place: Any, step: Any, count: Any):
        """Write `count` tables, `step` numbers apart, of the numbers of `x` from `first`."""
        del typing
        return types.void(x, first, patterns, tables, place, step, count), _write

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature, arguments)
        x, stands, tables = (v.array(place) for place in (0, 2, 3))
        _, first, _, _, place, step, count = arguments
        held = [v.load(v.at(stands, i * LANES)) for i in range(codes)]
        with v.loop(count) as turn:
            number = v.at(x, builder.add(first, builder.mul(turn, LONG(codes))))
            total = v.all(0.0)
            for i, stand in enumerate(held):
                total = v.fma(v.all(builder.load(v.at(number, i))), stand, total)
            v.store(total, v.at(tables, builder.add(place, builder.mul(turn, step))))
        return context.get_dummy_value()

    return entries


_FOUR, _TWO = _entries(4), _entries(2)


@numba.njit(nogil=True, boundscheck=False, cache=True)
def fill(x: Any, levels: Any, tables: Any) -> None:
    """Write the tables of vectors; see `multiply`.

    Parameters
    ----------
    x : float32 (vectors, width)
        Padded by zeros to as many numbers as there are codes in `tables`.
    levels : float32 (2,) or (4,)
        What a code stands for.
    """
    count, step = tables.shape[0], tables.shape[1] * LANES
    bits = levels.shape[0] // 2
    patterns = np.empty((4 // bits, LANES), np.float32)  # what the codes of four bits stand for
    for i in range(4 // bits):
        for index in range(LANES):
            patterns[i, index] = levels[index >> (i * bits) & (levels.shape[0] - 1)]
    for number in range(x.shape[0]):
        if bits == 1:
            _FOUR(x, number * x.shape[1], patterns, tables, number * LANES, step, count)
        else:
            _TWO(x, number * x.shape[1], patterns, tables, number * LANES, step, count)
