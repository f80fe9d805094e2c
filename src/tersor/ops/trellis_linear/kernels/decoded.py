"""Numbers from packed streams: a thread reads the bytes that its windows touch."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel
from tersor.ops.trellis_linear.kernels.filtering import bits_of, bits_until, segment_of


@triton.jit
def _signed(tap, word, place):
    # the tap, negated where the bit of the word at this place is clear
    sign = ((word >> place) & 1) - 1
    return (tap.to(tl.int32, bitcast=True) ^ (sign << 31)).to(tl.float32, bitcast=True)


@kernel
@triton.jit(do_not_specialize=["first", "rows", "length", "units", "count"])
def decode_across(codes, taps, scales, out, index, first, rows, width, length, units, count, UNIT: tl.constexpr,
                  SHIFTS: tl.constexpr, STEP: tl.constexpr, MEMORY: tl.constexpr, ROWS: tl.constexpr,
                  BYTES: tl.constexpr, INDEXED: tl.constexpr):
    """Rows `first` …, or those of an index, of streams along outputs: bits (stream, width), whole bytes a row."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = (place < rows)[:, None] & (byte < width // 8)[None, :]
    at = tl.load(index + place, place < rows, other=0).to(tl.int32) if INDEXED else tl.minimum(first + place, length - 1)
    start, size = segment_of(at // UNIT, units, count, length, UNIT)
    own = at - start
    phase = own % len(SHIFTS)
    newest = own // len(SHIFTS) * STEP + bits_until(phase + 1, SHIFTS) - 1
    total = bits_of(size, SHIFTS, STEP)
    base = start // len(SHIFTS) * STEP
    value = tl.zeros((ROWS, BYTES, 8), tl.float32)
    bits = tl.arange(0, 8)[None, None, :]
    for age in tl.static_range(MEMORY):
        bit = newest - age
        bit = tl.where(bit < 0, bit + total, bit) + base
        word = tl.load(codes + bit.to(tl.int64)[:, None] * (width // 8) + byte[None, :], inside, other=0).to(tl.int32)
        value += _signed(tl.load(taps + phase * MEMORY + age)[:, None, None], word[:, :, None], bits)
    value *= tl.load(scales + at).to(tl.float32)[:, None, None]
    there = out + place.to(tl.int64)[:, None, None] * width + byte[None, :, None] * 8 + bits
    tl.store(there, value.to(out.dtype.element_ty), tl.broadcast_to(inside[:, :, None], (ROWS, BYTES, 8)))


@kernel
@triton.jit(do_not_specialize=["first", "length", "stream", "units", "count"])
def decode_along(codes, taps, scales, out, index, first, length, stream, units, count, UNIT: tl.constexpr,
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
    value = tl.zeros((BLOCK,), tl.float32)
    for age in tl.static_range(MEMORY):
        bit = newest - age
        bit = tl.where(bit < 0, bit + total, bit) + base
        word = tl.load(codes + bit // 8, inside, other=0).to(tl.int32)
        value += _signed(tl.load(taps + phase * MEMORY + age), word, (bit % 8).to(tl.int32))
    value *= tl.load(scales + which).to(tl.float32)
    tl.store(out + row * length + place, value.to(out.dtype.element_ty), inside)
