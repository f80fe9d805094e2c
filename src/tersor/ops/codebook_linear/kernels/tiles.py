"""Codes on processors with matrix tiles (AMX): up to 64 vectors of bf16 meet 16 rows at a time.

Codes are looked up as in `levels`, two neighbours at a time: 16 pairs of bf16 are a register, and a row of a tile. So 16
rows are spread out to the nearest cache, and tiles are loaded from there. Sums are float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.extending import intrinsic
from torch import Tensor

from tersor.numerics.machine import njit
from tersor.ops.codebook_linear.kernels import levels
from tersor.ops.codebook_linear.kernels.levels import block_bytes, index, words
from tersor.ops.codebook_linear.shapes import lanes
from tersor.ops.codebook_linear.shapes.lanes import lane_codes
from tersor.ops.vectors import FLOATS, INT, INTS, LANES, LONG, Vectors, how

ROWS = 16  # of a tile, and vectors of one
TILE = ROWS * LANES  # numbers of 32 bits
AHEAD = 32  # rows that are asked for before they are read
SUMS, LEFT, RIGHT = (0, 1, 2, 3), 4, 5  # tile registers
LOW, HIGH = 0x0000FFFF, 0xFFFF0000
BYTE = ir.IntType(8)


@cache
def ready() -> bool:
    """Tell whether the machine has tiles and the system lets this process use them."""
    return "+amx-bf16" in (numba.config.CPU_FEATURES or get_host_cpu_features()).split(",") and torch.cpu._init_amx()


def arranged(x: Tensor, count: int, bits: int) -> Tensor:
    """Return bf16 vectors (vectors, width) as tiles of `count`, int32 of two each: (blocks, pairs, tiles, 16, 16)."""
    each = lane_codes(bits)
    blocks, tiles = -(-x.shape[1] // (LANES * each)), count // ROWS
    padded = torch.nn.functional.pad(x, (0, blocks * LANES * each - x.shape[1], 0, count - len(x)))
    pairs = padded.contiguous().view(torch.int32).view(tiles, ROWS, blocks, LANES, each // 2)
    return pairs.permute(2, 4, 0, 3, 1).contiguous()


def pairs_of(levels: Tensor, bits: int) -> np.ndarray:
    """Return the table in which two codes are looked up at once, of 1 and 2 bits; else one, for either half; float32.

    Entries are two numbers of bf16, side by side.
    """
    halves = levels.to(torch.bfloat16).view(torch.int16).to(torch.int32) & LOW
    index = torch.arange(LANES)
    low, high = (halves[index >> shift & 2**bits - 1] for shift in (0, bits if bits <= 2 else 0))
    return (low | high << 16).view(torch.float32).numpy()


def _pair(v: Vectors, table: Any, held: list[Any], turn: int, bits: int) -> Any:
    """Return two neighbouring codes of each lane as bf16."""
    one = v.look(v.load(table), index(v, held, 2 * turn, bits))
    if bits <= 2:
        return one
    other = v.look(v.load(table), index(v, held, 2 * turn + 1, bits))
    low, high = (v.builder.and_(v.builder.bitcast(part, INTS), v.all(INT(mask)))
                 for part, mask in ((one, LOW), (other, HIGH)))
    return v.builder.bitcast(v.either(low, high), FLOATS)


@intrinsic(prefer_literal=True)
def _rows(typing: Any, how: Any, at: Any, arrays: Any) -> Any:
    """Write products of `ROWS` rows.

    Parameters
    ----------
    how : str
        Bits of a code, tiles of vectors.
    at : (byte of the first row, bytes between rows, first row, rows of `y`, blocks of a row)
    arrays : (codes, table, x, y, shape)
        See `multiply`.
    """
    del typing
    return types.void(how, at, arrays), _write_rows


def _write_rows(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Vectors(context, builder, signature, arguments)
    bits, tiles = int(v.said(0)[0]), int(v.said(0)[1])
    codes, table, x, y = (v.array(2, i) for i in range(4))
    first, stride, row, rows, blocks = (v.value(1, i) for i in range(5))
    turns, size = lane_codes(bits) // 2, block_bytes(bits)
    held, line_bytes = v.room(INTS, turns * ROWS), LONG(4 * LANES)
    for tile in range(tiles):
        _call(builder, "tilezero", BYTE(SUMS[tile]))
    next_rows = v.at(codes, builder.add(first, builder.mul(stride, LONG(AHEAD))))
    with v.loop(blocks) as block:
        start = builder.add(first, builder.mul(block, LONG(size)))
        v.ask(v.at(next_rows, builder.mul(block, LONG(ROWS * size))), ROWS * size)
        with v.loop(LONG(ROWS)) as line:
            found = words(v, codes, builder.add(start, builder.mul(stride, line)), bits)
            for turn in range(turns):
                place = builder.add(line, LONG(turn * ROWS))
                v.store(v.builder.bitcast(_pair(v, table, found, turn, bits), INTS), v.at(held, place))
        met = v.at(x, builder.mul(block, LONG(turns * tiles * TILE)))
        with v.loop(LONG(turns)) as turn:
            _call(builder, "tileloadd64", BYTE(LEFT), _bytes(v, v.at(held, builder.mul(turn, LONG(ROWS)))), line_bytes)
            for tile in range(tiles):
                place = builder.add(builder.mul(turn, LONG(tiles * TILE)), LONG(tile * TILE))
                _call(builder, "tileloadd64", BYTE(RIGHT + tile % 2), _bytes(v, v.at(met, place)), line_bytes)
                _call(builder, "tdpbf16ps", BYTE(SUMS[tile]), BYTE(LEFT), BYTE(RIGHT + tile % 2))
    for tile in range(tiles):
        _call(builder, "tilestored64", BYTE(SUMS[tile]), _bytes(v, held), line_bytes)
        sums = v.transposed([v.load(v.at(held, i), INTS) for i in range(ROWS)])
        for i, line in enumerate(sums):
            place = builder.add(builder.mul(rows, LONG(tile * ROWS + i)), row)
            v.store(line, v.at(y, place))
    return context.get_dummy_value()


@intrinsic
def _begin(typing: Any, shape: Any) -> Any:
    """Give tile registers their shape."""
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature, arguments)
        _call(builder, "ldtilecfg", v.array(0))
        return context.get_dummy_value()

    return types.void(shape), write


@intrinsic
def _end(typing: Any) -> Any:
    """Leave the tile registers."""
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature, arguments
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), write


def _bytes(v: Vectors, address: Any) -> Any:
    return v.builder.bitcast(address, BYTE.as_pointer())


def _call(builder: Any, name: str, *arguments: Any) -> None:
    function = ir.FunctionType(ir.VoidType(), [one.type for one in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), arguments)


def shape() -> np.ndarray:
    """Return what `_begin` reads: every register has 16 rows of 64 bytes."""
    found = np.zeros(64, np.uint8)
    found[0] = 1
    found[16:32:2] = 64
    found[48:56] = ROWS
    return found


@cache
def multiply(bits: int, tiles: int) -> Any:
    """Return the kernel for codes of up to 4 bits and so many tiles of vectors, up to 4."""
    made = how(bits, tiles, sources=(lanes.__file__, levels.__file__))

    @njit()
    def multiply(codes: Any, stride: Any, table: Any, x: Any, y: Any, shape: Any, rows: Any) -> None:
        """Write the products of some tiles of rows.

        Parameters
        ----------
        codes : uint8 (rows of `stride` bytes and a block more,)
        table : float32 (16,)
            See `pairs_of`.
        x : see `arranged`
        y : float32 (16 tiles, rows)
        shape : see `shape`
        rows : (first, last)
            Tiles.
        """
        _begin(shape)
        for i in range(rows[0], rows[1]):
            _rows(made, (i * ROWS * stride, stride, i * ROWS, y.shape[1], x.shape[0]), (codes, table, x, y))
        _end()

    return multiply
