"""Rows of numbers from their codes."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@kernel
@triton.jit
def decode_rows(codes, table, scales, zeros, out, first, width, groups, scale_step, count, BITS: tl.constexpr,
                GROUP: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of numbers from their codes."""
    # one program: BLOCK numbers, row after row
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    row = first + place // width
    bit = (first.to(tl.int64) * width + place) * BITS
    low = tl.load(codes + bit // 8, inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        low = low | (tl.load(codes + (bit + BITS - 1) // 8, inside, other=0).to(tl.int32) << 8)
    value = tl.load(table + ((low >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)), inside, other=0.0).to(tl.float32)
    param = row * scale_step
    if GROUP:
        param = row * groups + (place % width) // GROUP
    if ZEROS:
        point = param * BITS
        low = tl.load(zeros + point // 8, inside, other=0).to(tl.int32)
        if 8 % BITS != 0:
            low = low | (tl.load(zeros + (point + BITS - 1) // 8, inside, other=0).to(tl.int32) << 8)
        value -= ((low >> (point % 8).to(tl.int32)) & ((1 << BITS) - 1)).to(tl.float32)
    value *= tl.load(scales + param, inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), inside)
