"""Queries as integers in bit planes, as signs of keys meet them: see bits.py for which column of a product has which."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels import bits

PLANES = tl.constexpr(bits.ASKED)
TILES = tl.constexpr(bits.ASKED_TILES)
LEAST = tl.constexpr(16)  # rows of a product
STEP = tl.constexpr(32)


@kernel
@triton.jit
def ask_signs(query, lines, offset, planes, begins, units, shifts, scaling, HEADS: tl.constexpr, ROWS: tl.constexpr,
              DIM: tl.constexpr, SIGNS: tl.constexpr, ROOM: tl.constexpr, PER_HEAD: tl.constexpr, SHIFTED: tl.constexpr,
              SETS: tl.constexpr):
    """Write the planes of a head's queries, (part, set, tile, step, lane), and what their sums begin with and count.

    Coordinates are divided by their largest, so that the largest integer is 2**(PLANES - 1) - 1. ROOM is a power of two
    that holds SIGNS.
    """
    tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    head = part % HEADS
    row = tl.arange(0, LEAST)
    place = tl.arange(0, ROOM)
    side = lines + (head * SIGNS * DIM if PER_HEAD else 0)
    numbers = tl.zeros([LEAST, ROOM], tl.float32)
    for first in tl.range(0, DIM, STEP):
        near = first + tl.arange(0, STEP)
        q = tl.load(query + (part * ROWS + row[:, None]) * DIM + near[None, :], (row < ROWS)[:, None] & (near >= 0)[None, :],
                    other=0.0).to(tl.float32)
        some = tl.load(side + place[None, :] * DIM + near[:, None], (place < SIGNS)[None, :] & (near >= 0)[:, None],
                       other=0.0)
        numbers = tl.dot(q, some, numbers, input_precision="tf32x3")
    largest = tl.max(tl.abs(numbers), 1)
    step = largest / ((1 << (PLANES - 1)) - 1)
    inverse = tl.where(largest > 0.0, 1.0 / step, 0.0)
    integers = tl.floor(numbers * inverse[:, None] + 0.5).to(tl.int32)
    tl.store(begins + part * (4 * SETS) + row, -tl.sum(integers, 1), row < 4 * SETS)
    tl.store(units + part * (4 * SETS) + row, step * scaling, row < 4 * SETS)
    shift = tl.zeros([LEAST], tl.float32)
    if SHIFTED:
        whole = tl.arange(0, DIM)
        q = tl.load(query + (part * ROWS + row[:, None]) * DIM + whole[None, :],
                    (row < ROWS)[:, None] & (whole >= 0)[None, :], other=0.0).to(tl.float32)
        shift = tl.sum(q * tl.load(offset + (head * DIM if PER_HEAD else 0) + whole)[None, :], 1) * scaling
    tl.store(shifts + part * (4 * SETS) + row, shift, row < 4 * SETS)
    STEPS: tl.constexpr = (SIGNS // 32 + 3) // 4
    word = tl.arange(0, ROOM // 32)[None, :]
    bit = tl.arange(0, 32)[None, None, :]
    split = integers.reshape([LEAST, ROOM // 32, 32])
    at = planes + (part * SETS + row[:, None] // 4) * (TILES * STEPS * 32) + word % STEPS * 32 + word // STEPS
    wanted = (row < 4 * SETS)[:, None] & (word < 4 * STEPS)
    for plane in tl.static_range(PLANES):
        words = tl.sum(((split >> plane) & 1) << bit, 2)
        tl.store(at + (plane // 2 * STEPS * 32 + 4 * (row[:, None] % 4 * 2 + plane % 2)), words, wanted)
