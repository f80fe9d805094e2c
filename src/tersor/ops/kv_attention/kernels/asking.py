"""Queries as integers in bit planes, as signs of keys meet them: see bits.py for which column of a product has which."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels import bits

PLANES = tl.constexpr(bits.ASKED)
TILES = tl.constexpr(bits.ASKED_TILES)
LEAST = tl.constexpr(16)  # rows of a product
WORD = tl.constexpr(32)


@kernel
@triton.jit
def ask_signs(query, lines, bounds, offset, planes, begins, units, shifts, scaling, HEADS: tl.constexpr,
              ROWS: tl.constexpr, DIM: tl.constexpr, SIGNS: tl.constexpr, STEPS: tl.constexpr, PER_HEAD: tl.constexpr,
              SHIFTED: tl.constexpr, SETS: tl.constexpr):
    """Write a word of each plane of a head's queries, (part, set, tile, step, lane), and what its sums begin with.

    Coordinates are divided by a bound of theirs, of which the largest integer, 2**(PLANES - 1) - 1, is one: 2-norms of
    the query and, in `bounds`, of the longest line. Words beyond the last are zeros. `begins` is (part, word, row).
    """
    tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    word = tl.program_id(1)
    head = part % HEADS
    row = tl.arange(0, LEAST)
    near = tl.arange(0, DIM)
    place = word * WORD + tl.arange(0, WORD)
    q = tl.load(query + (part * ROWS + row[:, None]) * DIM + near[None, :], (row < ROWS)[:, None] & (near >= 0)[None, :],
                other=0.0).to(tl.float32)
    some = tl.load(lines + (head * SIGNS * DIM if PER_HEAD else 0) + place[:, None] * DIM + near[None, :],
                   (place < SIGNS)[:, None] & (near >= 0)[None, :], other=0.0)
    numbers = tl.dot(q, tl.trans(some), input_precision="tf32x3")
    bound = tl.sqrt(tl.sum(q * q, 1)) * tl.load(bounds + (head if PER_HEAD else 0))
    step = bound / ((1 << (PLANES - 1)) - 1)
    inverse = tl.where(bound > 0.0, 1.0 / step, 0.0)
    integers = tl.floor(numbers * inverse[:, None] + 0.5).to(tl.int32)
    at_row = part * (4 * SETS) + row
    tl.store(begins + (part * (4 * STEPS) + word) * (4 * SETS) + row, -tl.sum(integers, 1), row < 4 * SETS)
    if word == 0:
        tl.store(units + at_row, step * scaling, row < 4 * SETS)
        shift = tl.zeros([LEAST], tl.float32)
        if SHIFTED:
            shift = tl.sum(q * tl.load(offset + (head * DIM if PER_HEAD else 0) + near)[None, :], 1) * scaling
        tl.store(shifts + at_row, shift, row < 4 * SETS)
    bit = tl.arange(0, WORD)[None, :]
    at = planes + (part * SETS + row // 4) * (TILES * STEPS * WORD) + word % STEPS * WORD + word // STEPS
    for plane in tl.static_range(PLANES):
        words = tl.sum(((integers >> plane) & 1) << bit, 1)
        tl.store(at + (plane // 2 * STEPS * WORD + 4 * (row % 4 * 2 + plane % 2)), words, row < 4 * SETS)
