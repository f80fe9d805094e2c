"""Packed numbers: of a power of two levels at their place, digits of words one after another."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@triton.jit
def bits_at(words, place, last, WIDTH: tl.constexpr, inside):
    """Return numbers of WIDTH bits at `place` of a little-endian stream, of bytes or 16 bits, that ends at `last`."""
    if WIDTH == 8:
        return tl.load(words + place, inside, other=0).to(tl.int32)
    elif WIDTH == 16:
        return tl.load(words + place, inside, other=0).to(tl.int32) & 0xFFFF
    else:
        bit = place.to(tl.int64) * WIDTH
        first = bit >> 3
        found = tl.load(words + first, inside, other=0).to(tl.int32)
        if 8 % WIDTH != 0:
            found |= tl.load(words + first + 1, inside & (first + 1 <= last), other=0).to(tl.int32) << 8
        if WIDTH > 10 or WIDTH == 9:
            found |= tl.load(words + first + 2, inside & (first + 2 <= last), other=0).to(tl.int32) << 16
        return (found >> (bit & 7).to(tl.int32)) & ((1 << WIDTH) - 1)


@kernel
@triton.jit
def unpack_digits(words, out, count, last, LEVELS: tl.constexpr, DIGITS: tl.constexpr, BYTES: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Write the digits of words of BYTES bytes, one after the other.

    Quotients are estimated in float64, what is left is divided again, which comes within 1, and that is corrected.
    """
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = tl.zeros([BLOCK], tl.int64)
    for k in tl.static_range(BYTES):
        at = word * BYTES + k
        number |= tl.load(words + at, at <= last, other=0).to(tl.int64) << (8 * k)
    for digit in tl.static_range(DIGITS):
        rest = (number.to(tl.float64) * (1.0 / LEVELS)).to(tl.int64)
        code = (number - rest * LEVELS).to(tl.int32)
        more = (code.to(tl.float64) * (1.0 / LEVELS)).to(tl.int32)
        code -= more * LEVELS
        carry = (code >= LEVELS).to(tl.int32) - (code < 0).to(tl.int32)
        code -= carry * LEVELS
        number = rest + (more + carry).to(tl.int64)
        place = word * DIGITS + digit
        tl.store(out + place, code.to(out.dtype.element_ty), place < count)


@kernel
@triton.jit
def unpack_bits(books, out, count, last, WIDTH: tl.constexpr, MIDDLE: tl.constexpr, BLOCK: tl.constexpr):
    """Write numbers of WIDTH bits, less MIDDLE, one after the other."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    number = bits_at(books, place, last, WIDTH, inside)
    tl.store(out + place, (number - MIDDLE).to(tl.float32).to(out.dtype.element_ty), inside)
