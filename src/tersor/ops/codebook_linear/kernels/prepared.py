"""Vectors as several of them are multiplied: scaled, in half precision, where their codes will be."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@triton.jit
def _store_bytes(table, lut, BITS: tl.constexpr, MIRRORED: tl.constexpr):
    # the table's bytes as fp16, four levels a word: 4 words of high bytes, 4 of low ones
    word = tl.arange(0, 4)
    high = word * 0
    low = word * 0
    for j in tl.static_range(4):
        level = word * 4 + j
        if MIRRORED:  # the table holds the upper half of a symmetric one
            upper = level >= (1 << BITS) // 2
            half_level = tl.where(upper, level - (1 << BITS) // 2, (1 << BITS) // 2 - 1 - level)
            number = tl.load(table + half_level, level < (1 << BITS), other=0.0).to(tl.float16)
            number = tl.where(upper, number, -number)
        else:
            number = tl.load(table + level, level < (1 << BITS), other=0.0).to(tl.float16)
        wide = number.to(tl.int16, bitcast=True).to(tl.int32)
        high = high | (((wide >> 8) & 255) << (8 * j))
        low = low | ((wide & 255) << (8 * j))
    tl.store(lut + word, high)
    tl.store(lut + 4 + word, low)


@kernel
@triton.jit
def prepare(x, table, xp, lut, peaks, totals, sums, width, row_step, column_step, part_step, padded,
            BITS: tl.constexpr, FIELDS: tl.constexpr, MIRRORED: tl.constexpr, RUN: tl.constexpr, UNIT: tl.constexpr,
            ROW: tl.constexpr):
    """Vectors as the other operand of `multiply_rows`, with their sums, and the bytes of the table."""
    # one program: UNIT numbers of one vector, scaled by a power of two so that the largest of all lies in [16, 32)
    tl.extra.cuda.gdc_launch_dependents()  # what follows may begin to load its codes
    tl.extra.cuda.gdc_wait()  # what comes before may still write the vectors
    row = tl.program_id(0)
    unit = tl.program_id(1)
    x += row.to(tl.int64) * row_step
    every = tl.arange(0, ROW)
    whole = tl.load(x + every, every < width, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(whole), 0)
    exponent = ((peak.to(tl.int32, bitcast=True) >> 23) & 255) - 131  # floor(log2(peak)) - 4
    exponent = tl.minimum(tl.maximum(exponent, -120), 123)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    inside = tl.arange(0, UNIT)
    k = unit * UNIT + inside
    mine = k < padded
    value = (tl.load(x + k, mine & (k < width), other=0.0).to(tl.float32) * inverse).to(tl.float16)
    tl.store(sums + row * tl.num_programs(1) + unit, tl.sum(value.to(tl.float32), 0))
    # where a number meets its code: part and element, as the fragments are laid out
    if BITS == 3:
        part, element = (k // 2) % 32, (k // 64) * 2 + k % 2
    elif BITS == 8 and not FIELDS:
        part, element = k % 4, k // 4
    else:
        CODES: tl.constexpr = 32 // BITS  # of a word
        code = k % CODES
        if FIELDS:
            part, half = code % (CODES // 2), code // (CODES // 2)
            bit = part * BITS % (10 if BITS < 3 else 8)
            value = (value.to(tl.float32) * tl.exp2(9.0 - bit.to(tl.float32))).to(tl.float16)
        elif BITS == 2:
            part, half = (code % 2) * 4 + code // 4, (code // 2) % 2
        else:
            part, half = code // 2, code % 2
        part += (k // CODES) % 2 * (CODES // 2)
        element = k // (2 * CODES) * 2 + half
    if RUN == 4:  # a lane holds elements 4 t to 4 t + 3 of a tile
        slot = element // 4 * 4 + part % 2 * 2 + element // 2 % 2
    else:  # 2 t, 2 t + 1 and 2 t + 8, 2 t + 9
        slot = element // 16 * 16 + part % 2 * 8 + element % 8 // 2 * 2 + element // 8 % 2
    place = (part // 2).to(tl.int64) * part_step + slot * 2 + element % 2
    tl.store(xp + place + row * column_step, value, mine)
    if unit == 0:
        tl.store(peaks + row, ((127 + exponent) << 23).to(tl.float32, bitcast=True))
        if FIELDS:
            tl.store(totals + row, tl.sum((whole * inverse).to(tl.float16).to(tl.float32), 0))
        if (row == 0) & (not FIELDS):
            _store_bytes(table, lut, BITS, MIRRORED)
