"""Vectors as lanes meet them, rows of numbers from a table in memory, and sums of parts."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel
from tersor.ops.trellis_linear.kernels.filtering import bits_of, bits_until, segment_of


@kernel
@triton.jit
def arrange(x, xp, peaks, width, row_step, batch, padded, CHUNK: tl.constexpr, STORED: tl.constexpr,
            UNIT: tl.constexpr, ROW: tl.constexpr):
    """Vectors in half precision, scaled by a power of two so that the largest number lies in [16, 32), and the powers.

    To (padded / 4 CHUNK, CHUNK / 8, STORED, 4, 8): four lanes' chunks by turns, of all vectors; zeros beyond.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()  # what comes before may still write the vectors
    row = tl.program_id(0)
    there = row < batch
    x += row.to(tl.int64) * row_step
    peak = 0.0
    for start in range(0, width, ROW):
        every = start + tl.arange(0, ROW)
        whole = tl.load(x + every, (every < width) & there, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(whole), 0))
    exponent = ((peak.to(tl.int32, bitcast=True) >> 23) & 255) - 131  # floor(log2(peak)) - 4
    exponent = tl.minimum(tl.maximum(exponent, -120), 123)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    k = tl.program_id(1) * UNIT + tl.arange(0, UNIT)
    value = (tl.load(x + k, (k < width) & there, other=0.0).to(tl.float32) * inverse).to(tl.float16)
    eight = k // (4 * CHUNK) * (CHUNK // 8) + k % CHUNK // 8
    place = ((eight.to(tl.int64) * STORED + row) * 4 + k // CHUNK % 4) * 8 + k % 8
    tl.store(xp + place, value, k < padded)
    if tl.program_id(1) == 0:
        tl.store(peaks + row, ((127 + exponent) << 23).to(tl.float32, bitcast=True))


@kernel
@triton.jit(do_not_specialize=["first", "rows", "length", "units", "count"])
def look_across(codes, table, scales, out, index, first, rows, width, length, units, count, UNIT: tl.constexpr,
                SHIFTS: tl.constexpr, STEP: tl.constexpr, MEMORY: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, INDEXED: tl.constexpr):
    """Rows `first` …, or those of an index, of streams along outputs: bits (stream, width), one after another."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (place < rows)[:, None] & (column < width)[None, :]
    at = tl.load(index + place, place < rows, other=0).to(tl.int32) if INDEXED else tl.minimum(first + place, length - 1)
    start, size = segment_of(at // UNIT, units, count, length, UNIT)
    own = at - start
    phase = own % len(SHIFTS)
    newest = own // len(SHIFTS) * STEP + bits_until(phase + 1, SHIFTS) - 1
    total = bits_of(size, SHIFTS, STEP)
    base = start // len(SHIFTS) * STEP
    state = tl.zeros((ROWS, COLUMNS), tl.int32)
    for age in tl.static_range(MEMORY):
        bit = newest - age
        bit = tl.where(bit < 0, bit + total, bit) + base
        there = bit.to(tl.int64)[:, None] * width + column[None, :]
        word = tl.load(codes + there // 8, inside, other=0).to(tl.int32)
        state |= (word >> (there % 8).to(tl.int32) & 1) << age
    value = tl.load(table + (phase[:, None] << MEMORY) + state, inside, other=0.0)
    value *= tl.load(scales + at).to(tl.float32)[:, None]
    tl.store(out + place.to(tl.int64)[:, None] * width + column[None, :], value.to(out.dtype.element_ty), inside)


@kernel
@triton.jit(do_not_specialize=["first", "length", "stream", "units", "count"])
def look_along(codes, table, scales, out, index, first, length, stream, units, count, UNIT: tl.constexpr,
               SHIFTS: tl.constexpr, STEP: tl.constexpr, MEMORY: tl.constexpr, BLOCK: tl.constexpr,
               INDEXED: tl.constexpr):
    """Rows `first` …, or those of an index, of streams along inputs: bits (n, stream), row after row."""
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    which = tl.load(index + row).to(tl.int64) if INDEXED else first + row
    inside = place < length
    start, size = segment_of(tl.minimum(place, length - 1) // UNIT, units, count, length, UNIT)
    own = place - start
    phase = own % len(SHIFTS)
    newest = own // len(SHIFTS) * STEP + bits_until(phase + 1, SHIFTS) - 1
    total = bits_of(size, SHIFTS, STEP)
    base = which * stream + start // len(SHIFTS) * STEP
    state = tl.zeros((BLOCK,), tl.int32)
    for age in tl.static_range(MEMORY):
        bit = newest - age
        bit = tl.where(bit < 0, bit + total, bit) + base
        word = tl.load(codes + bit // 8, inside, other=0).to(tl.int32)
        state |= (word >> (bit % 8).to(tl.int32) & 1) << age
    value = tl.load(table + (phase << MEMORY) + state, inside, other=0.0) * tl.load(scales + which).to(tl.float32)
    tl.store(out + row * length + place, value.to(out.dtype.element_ty), inside)


@kernel
@triton.jit
def sum_parts(parts, out, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of PARTS arrays of `count` numbers each, in their order."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.load(parts + place, inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * count + place, inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)
