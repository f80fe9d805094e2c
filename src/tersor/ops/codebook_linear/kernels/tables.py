"""Codes of 1 and 2 bits on the processor: four bits of a row look up what they add to the product.

For every four bits of a row, what they stand for times what they meet has 16 values, a register's table; each is one
lookup, an addition and a shift for 16 rows, whatever the levels. Rows lie one after another, so words of 16 rows are
transposed first. Two times 16 rows share a table.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.vectors import INTS, LANES, LONG, Vectors, how

AHEAD = 32  # rows that are asked for before they are read
ROWS = 2 * LANES  # of a tile
WORDS = LANES  # of 32 bits that are transposed together
LOOKUPS = 8  # of a word
CHAINS = 2  # sums that the lookups of a word take turns in: additions of one wait for each other


@intrinsic(prefer_literal=True)
def _tile(typing: Any, how: Any, codes: Any, at: Any, tables: Any, y: Any) -> Any:
    """Write products of `ROWS` rows.

    Parameters
    ----------
    how : str
        The number of vectors.
    at : (byte of the first row, bytes between rows, first row, rows of `y`, blocks of `WORDS` words)
    codes, tables, y
        See `multiply`.
    """
    del typing
    return types.void(how, codes, at, tables, y), _write_tile


def _write_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Vectors(context, builder, signature, arguments)
    vectors, halves = int(v.said(0)[0]), range(ROWS // LANES)
    codes, tables, y = (v.array(place) for place in (1, 3, 4))
    first, stride, row, rows, blocks = (v.value(2, i) for i in range(5))
    sums = [[[v.room() for _ in range(CHAINS)] for _ in range(vectors)] for _ in halves]
    for room in (room for half in sums for chains in half for room in chains):
        v.store(v.all(0.0), room)
    words = v.room(INTS, ROWS // LANES * WORDS)
    next_tile = v.at(codes, builder.add(first, builder.mul(stride, LONG(AHEAD))))
    with v.loop(blocks) as block:
        start = builder.add(first, builder.mul(block, LONG(4 * WORDS)))
        v.ask(v.at(next_tile, builder.mul(block, LONG(ROWS * 4 * WORDS))), ROWS * 4 * WORDS)
        for half in halves:
            lines = [builder.add(start, builder.mul(stride, LONG(half * LANES + i))) for i in range(LANES)]
            for i, column in enumerate(v.transposed([v.load(v.at(codes, line), INTS) for line in lines])):
                v.store(column, v.at(words, half * WORDS + i))
        with v.loop(LONG(WORDS)) as word:
            place = builder.mul(builder.add(builder.mul(block, LONG(WORDS)), word), LONG(LOOKUPS * vectors * LANES))
            held = [v.load(v.at(words, builder.add(word, LONG(half * WORDS))), INTS) for half in halves]
            for j in range(LOOKUPS):
                index = [v.right(one, 4 * j) for one in held]
                for number in range(vectors):
                    table = v.load(v.at(tables, builder.add(place, LONG((j * vectors + number) * LANES))))
                    for half, one in enumerate(index):
                        room = sums[half][number][j % CHAINS]
                        v.store(v.add(v.load(room), v.look(table, one)), room)
    for half in halves:
        for number, chains in enumerate(sums[half]):
            total = v.load(chains[0])
            for room in chains[1:]:
                total = v.add(total, v.load(room))
            place = builder.add(builder.mul(rows, LONG(number)), builder.add(row, LONG(half * LANES)))
            v.store(total, v.at(y, place))
    return context.get_dummy_value()


@cache
def multiply(vectors: int) -> Any:
    """Return the kernel for so many vectors."""
    made = how(vectors)

    @njit()
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
        blocks = tables.shape[0] // (WORDS * LOOKUPS)
        for i in range(tiles[0], tiles[1]):
            _tile(made, codes, (i * ROWS * stride, stride, i * ROWS, y.shape[1], blocks), tables, y)

    return multiply


@intrinsic(prefer_literal=True)
def _entries(typing: Any, how: Any, x: Any, patterns: Any, tables: Any, at: Any) -> Any:
    """Write the tables of one vector.

    Parameters
    ----------
    how : str
        Codes of a table.
    x, tables
        See `fill`.
    patterns : float32 (codes, 16)
        What the codes of four bits stand for.
    at : (first number of `x`, first of `tables`, numbers between tables, tables)
    """
    del typing
    return types.void(how, x, patterns, tables, at), _write_entries


def _write_entries(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Vectors(context, builder, signature, arguments)
    x, patterns, tables = (v.array(place) for place in (1, 2, 3))
    first, place, step, count = (v.value(4, i) for i in range(4))
    codes = int(v.said(0)[0])
    held = [v.load(v.at(patterns, i * LANES)) for i in range(codes)]
    with v.loop(count) as turn:
        number = v.at(x, builder.add(first, builder.mul(turn, LONG(codes))))
        total = v.all(0.0)
        for i, pattern in enumerate(held):
            total = v.fma(v.all(builder.load(v.at(number, i))), pattern, total)
        v.store(total, v.at(tables, builder.add(place, builder.mul(turn, step))))
    return context.get_dummy_value()


@cache
def fill(bits: int) -> Any:
    """Return the kernel that writes tables for codes of so many bits."""
    made, codes, top = how(4 // bits), 4 // bits, 2**bits - 1

    @njit()
    def fill(x: Any, levels: Any, tables: Any) -> None:
        """Write the tables of vectors; see `multiply`.

        Parameters
        ----------
        x : float32 (vectors, width)
            Padded by zeros to as many numbers as there are codes in `tables`.
        levels : float32 (2,) or (4,)
            What a code stands for.
        """
        patterns = np.empty((codes, LANES), np.float32)
        for i in range(codes):
            for index in range(LANES):
                patterns[i, index] = levels[index >> (i * bits) & top]
        step = tables.shape[1] * LANES
        for number in range(x.shape[0]):
            _entries(made, x, patterns, tables, (number * x.shape[1], number * LANES, step, tables.shape[0]))

    return fill
