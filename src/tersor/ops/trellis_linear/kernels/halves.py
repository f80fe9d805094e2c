"""Numbers of 16 bits from packed streams: two at a time, in float16, where a sign is one bit of a word of two.

A sum of as many taps as a window has is rounded by about what the result is rounded by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel
from tersor.ops.trellis_linear.kernels.filtering import bits_of, bits_until


@triton.jit
def _pair(low, high):
    # two numbers as float16 in one word
    first = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return first | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _added(sums, pair, word, place):
    # bits `place` and `place + 16` of a word give the signs of the two taps
    signed = pair ^ ((~(word << (15 - place))) & -2147450880)
    return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [sums, signed], dtype=tl.int32, is_pure=True,
                                     pack=1)


@triton.jit
def _low(pair):
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _high(pair):
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _bits_at(codes, bit, words, inside):
    # 33 bits of the stream and more from a place on
    word = bit // 32
    low = tl.load(codes + word, inside & (word >= 0), other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(codes + word + 1, inside & (word + 1 < words), other=0).to(tl.int64)
    return ((high << 32) | low) >> (bit % 32).to(tl.int64)


@triton.jit
def _window(codes, at, size, base, words, inside, SHIFTS: tl.constexpr, STEP: tl.constexpr, MEMORY: tl.constexpr):
    # the bits that number `at` of a segment sees, oldest first
    oldest = at // len(SHIFTS) * STEP + bits_until(at % len(SHIFTS) + 1, SHIFTS) - MEMORY
    before = tl.maximum(-oldest, 0)  # bits from the other end of the circle
    seen = _bits_at(codes, base + tl.maximum(oldest, 0), words, inside)
    turned = _bits_at(codes, base + bits_of(size, SHIFTS, STEP) - before, words, inside & (before > 0))
    wide = before.to(tl.int64)
    return (seen << wide) | (turned & ((tl.full(wide.shape, 1, tl.int64) << wide) - 1))


@kernel
@triton.jit(do_not_specialize=["first", "words", "units", "count"])
def decode_along(codes, taps, scales, out, first, words, length, stream, units, count, UNIT: tl.constexpr,
                 SHIFTS: tl.constexpr, STEP: tl.constexpr, MEMORY: tl.constexpr, PAIRS: tl.constexpr):
    """Rows `first` … of streams along inputs: words of bits (n, stream) to (rows, length); a program a segment."""
    pair = tl.arange(0, PAIRS)
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    start = UNIT * (index * units // count)
    size = tl.where(index == count - 1, length, UNIT * ((index + 1) * units // count)) - start
    even, odd = 2 * pair, 2 * pair + 1
    base = (first + row) * stream + start // len(SHIFTS) * STEP
    left = _window(codes, even, size, base, words, even < size, SHIFTS, STEP, MEMORY)
    right = _window(codes, odd, size, base, words, odd < size, SHIFTS, STEP, MEMORY)
    sums = tl.zeros((PAIRS,), tl.int32)
    for chunk in tl.static_range((MEMORY + 15) // 16):
        word = ((left >> (16 * chunk)).to(tl.int32) & 0xFFFF) | ((right >> (16 * chunk)).to(tl.int32) << 16)
        for place in tl.static_range(min(16, MEMORY - 16 * chunk)):
            tap = taps + (MEMORY - 1 - 16 * chunk - place)
            near = _pair(tl.load(tap), tl.load(tap + 1 % len(SHIFTS) * MEMORY))
            if len(SHIFTS) == 4:
                far = _pair(tl.load(tap + 2 * MEMORY), tl.load(tap + 3 * MEMORY))
                near = tl.where(pair % 2 == 1, far, near)
            sums = _added(sums, near, word, place)
    scale = tl.load(scales + first + row).to(tl.float32)
    there = out + row * length + start + even
    tl.store(there, (_low(sums) * scale).to(out.dtype.element_ty), even < size)
    tl.store(there + 1, (_high(sums) * scale).to(out.dtype.element_ty), odd < size)
