"""Codes of up to 4 bits on the processor: 16 codes of a row look up their levels, which meet the vectors.

A register holds the table. A word of a row, in each of 16 lanes, holds several codes: a shift brings the next one of
every lane to where the lookup takes it. Codes are not put in order; the vectors are instead (`ordered`). Words of 3
bits come in threes, of 32 codes. In groups, what a lane has summed up over a block is scaled by the scale of its group.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.codebook_linear.shapes import lanes
from tersor.ops.codebook_linear.shapes.lanes import lane_codes
from tersor.ops.vectors import FLOATS, INT, INTS, LANES, LONG, Vectors, how

AHEAD = 8  # rows that are asked for before they are read
PLAIN, SCALES, ZEROS, AFFINE = "plain", "scales", "zeros", "affine"
ROWS = 4  # of a tile: they share the loads of a vector

def block_bytes(bits: int) -> int:
    """Return the bytes of a block: a vector of words, three at 3 bits."""
    return 4 * LANES * (3 if bits == 3 else 1)


def ordered(x: np.ndarray, bits: int) -> np.ndarray:
    """Return vectors (vectors, width) in the order in which codes are met, float32 (blocks, codes of a lane, vectors, 16)."""
    each = lane_codes(bits)
    blocks = -(-x.shape[1] // (LANES * each))
    if blocks * LANES * each > x.shape[1]:
        padded = np.zeros((len(x), blocks * LANES * each), np.float32)
        padded[:, : x.shape[1]] = x
        x = padded
    return np.ascontiguousarray(x.reshape(len(x), blocks, LANES, each).transpose(1, 3, 0, 2))


def words(v: Vectors, codes: Any, first: Any, bits: int) -> list[Any]:
    """Return the words of a block that starts at a byte: a vector, or three at 3 bits, a lane's words one after another."""
    parts = [v.load(v.at(codes, v.builder.add(first, LONG(4 * LANES * i))), INTS) for i in range(3 if bits == 3 else 1)]
    if bits != 3:
        return parts
    out = []
    for which in range(3):  # of every third word: those of the first two vectors, then those of the last
        places = [3 * lane + which for lane in range(LANES)]
        low = v.pick(parts[0], parts[1], [place if place < 2 * LANES else 0 for place in places])
        out.append(v.pick(low, parts[2], [lane if place < 2 * LANES else place - LANES for lane, place in enumerate(places)]))
    return out


def index(v: Vectors, held: list[Any], code: int, bits: int) -> Any:
    """Return a vector whose lowest bits are a code of each lane; those above are others'."""
    word, shift = divmod(code * bits, 32)
    low = v.right(held[word], shift)
    return low if shift + bits <= 32 else v.either(low, v.left(held[word + 1], 32 - shift))


def level(v: Vectors, table: Any, held: list[Any], code: int, how: tuple[int, str]) -> Any:
    """Return what a code of each lane stands for; see `table_of`, whose address `table` is."""
    bits, kind = how
    found = index(v, held, code, bits)
    if bits < 8:
        return v.look(v.load(table), found)
    found = v.builder.and_(found, v.all(INT(2**bits - 1)))
    if AFFINE not in kind:
        return v.gather(table, found)
    low, step = (v.all(v.builder.load(v.at(table, i))) for i in range(2))
    return v.fma(v.builder.sitofp(found, FLOATS), step, low)


def table_of(levels: np.ndarray, form: str) -> np.ndarray:
    """Return what kernels look levels up in, float32.

    A table of 16 numbers is looked up by codes and whatever bits lie above them; codes of 8 bits have 256, or, of affine
    tables, the lowest level and the step between two.
    """
    if len(levels) <= LANES:
        levels = np.tile(levels, LANES // len(levels))
    elif form == "affine":
        levels = np.array([levels[0], (levels[-1] - levels[0]) / (len(levels) - 1)])
    return np.ascontiguousarray(levels, dtype=np.float32)


@intrinsic(prefer_literal=True)
def _tile(typing: Any, how: Any, at: Any, arrays: Any, groups: Any) -> Any:
    """Write products of `ROWS` rows.

    Parameters
    ----------
    how : str
        Bits of a code, vectors, and what is not plain, as `multiply` has them.
    at : (byte of the first row, bytes between rows, first row, rows of `y`, blocks of a row)
    arrays : (codes, table, x, y)
        See `multiply`.
    groups
        See `multiply`.
    """
    del typing
    return types.void(how, at, arrays, groups), _write_tile


def _write_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Vectors(context, builder, signature, arguments)
    bits, vectors, kind = int(v.said(0)[0]), int(v.said(0)[1]), v.said(0)[2]
    codes, table, x, y = (v.array(2, i) for i in range(4))
    first, stride, row, rows, blocks = (v.value(1, i) for i in range(5))
    sums = [[v.room() for _ in range(vectors)] for _ in range(ROWS)]
    for room in (room for line in sums for room in line):
        v.store(v.all(0.0), room)
    lines = [builder.add(first, builder.mul(stride, LONG(i))) for i in range(ROWS)]
    each, size, scaled = lane_codes(bits), block_bytes(bits), SCALES in kind
    next_tile = v.at(codes, builder.add(first, builder.mul(stride, LONG(AHEAD))))
    with v.loop(blocks) as block:
        start = builder.mul(block, LONG(size))
        met = v.at(x, builder.mul(block, LONG(each * vectors * LANES)))
        held = [words(v, codes, builder.add(line, start), bits) for line in lines]
        v.ask(v.at(next_tile, builder.mul(block, LONG(ROWS * size))), ROWS * size)
        parts = [[v.all(0.0) if scaled else v.load(room) for room in line] for line in sums]
        for code in range(each):
            numbers = [v.load(v.at(met, (code * vectors + i) * LANES)) for i in range(vectors)]
            for line, one in enumerate(held):
                found = level(v, table, one, code, (bits, kind))
                for i, number in enumerate(numbers):
                    parts[line][i] = v.fma(found, number, parts[line][i])
        if scaled:
            parts = _scaled(v, kind, (block, row), parts)
        for line, part in zip(sums, parts, strict=True):
            for room, one in zip(line, part, strict=True):
                v.store(v.add(v.load(room), one) if scaled else one, room)
    for line, part in enumerate(sums):
        for i, room in enumerate(part):
            place = builder.add(builder.mul(rows, LONG(i)), builder.add(row, LONG(line)))
            builder.store(v.total(v.load(room)), v.at(y, place))
    return context.get_dummy_value()


def _scaled(v: Vectors, kind: str, place: tuple[Any, Any], parts: list[list[Any]]) -> list[list[Any]]:
    """Return the sums of a block, less those of its zero points where there are such, times their lanes' scales."""
    builder, (block, row) = v.builder, place
    scales, zeros, sums, first, near = (v.array(3, i) for i in range(5))
    count = v.value(3, 5)
    index = v.load(v.at(near, builder.mul(block, LONG(LANES))), INTS)
    out = []
    for line, part in enumerate(parts):
        at = builder.add(builder.mul(builder.add(row, LONG(line)), count), builder.load(v.at(first, block)))
        scale = v.look(v.load(v.at(scales, at)), index)
        if ZEROS in kind:
            zero = v.look(v.load(v.at(zeros, at)), index)
            spot = builder.mul(block, LONG(len(part) * LANES))
            part = [v.sub(one, v.mul(zero, v.load(v.at(sums, builder.add(spot, LONG(i * LANES))))))
                    for i, one in enumerate(part)]
        out.append([v.mul(one, scale) for one in part])
    return out


@cache
def multiply(bits: int, vectors: int, kind: str = PLAIN) -> Any:
    """Return the kernel for codes of so many bits and so many vectors; `kind` names what is not plain.

    That is: `SCALES` of groups, their `ZEROS`, and tables of 8 bits that are `AFFINE`.
    """
    made = how(bits, vectors, kind, sources=(lanes.__file__,))

    @njit()
    def multiply(codes: Any, stride: Any, table: Any, x: Any, y: Any, groups: Any, tiles: Any) -> None:
        """Write the products of tiles of rows.

        Parameters
        ----------
        codes : uint8 (rows of `stride` bytes and a block more,)
        table : see `table_of`
        x : see `ordered`
        y : float32 (vectors, rows)
        groups : (scales, zeros, sums, first, near, groups of a row)
            Read where `kind` says so: float32 (rows * groups + 16,) both; the sums of `x` over a lane's codes; and
            `groups_of`.
        tiles : (first, last)
        """
        for i in range(tiles[0], tiles[1]):
            _tile(made, (i * ROWS * stride, stride, i * ROWS, y.shape[1], x.shape[0]), (codes, table, x, y), groups)

    return multiply


@lru_cache(maxsize=64)
def groups_of(width: int, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first group that a block meets, int64 (blocks,), and that of each lane after it, int32 (blocks, 16).

    Groups are of whole words: of a multiple of `lane_codes`.
    """
    each = lane_codes(bits)
    blocks = -(-width // (LANES * each))
    starts = np.minimum(np.arange(blocks * LANES) * each, width - 1).reshape(blocks, LANES) // group
    return starts[:, 0].astype(np.int64), np.ascontiguousarray(starts - starts[:, :1], dtype=np.int32)
