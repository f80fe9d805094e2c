"""Codewords looked up, scaled, and swapped back in registers.

A tile is BR rows by MG groups of DIM numbers of each of the C = 2^LAYERS blocks that swaps make of a row: C tensors
[BR, MG, DIM], which hold DIM MG runs of C numbers that lay side by side before the swaps. See README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.product_linear.kernels.packed import bits_at


@triton.jit
def affine(scale, offset, middle, SCALED: tl.constexpr, SHIFTED: tl.constexpr):
    """Return factor and shift: a number n that is less by `middle` than that stored stands for n * factor + shift."""
    factor = 1.0
    if SCALED:
        factor = tl.load(scale)
    shift = 0.0
    if SHIFTED:
        shift = tl.load(offset) + middle * factor
    return factor, shift


@triton.jit
def weights(codes, books, mask, factor, shift, row, group, inside, groups, last, WORDS: tl.constexpr, DIM: tl.constexpr,
            SHARED: tl.constexpr, LAYERS: tl.constexpr, BITS: tl.constexpr):
    """Return 2^LAYERS tensors [BR, MG, DIM]: number t holds weights of inputs 2^LAYERS m + t, m = group DIM + d."""
    d = tl.arange(0, DIM)[None, None, :]
    held = inside[:, :, None] & (d >= 0)
    each = groups >> LAYERS
    m = group.to(tl.int64)[None, :, None] * DIM + d
    found = ()
    for c in tl.static_range(1 << LAYERS):
        place = row[:, None] * groups + (c * each + group)[None, :]
        code = bits_at(codes, place, last, BITS, inside)
        if not SHARED:
            code += (c * each + group)[None, :] * WORDS
        number = tl.load(books + code.to(tl.int64)[:, :, None] * DIM + d, held, other=0.0)
        found = found + (number.to(tl.float32) * factor + shift,)
    for undone in tl.static_range(LAYERS):
        made = ()
        for block in tl.static_range(1 << (LAYERS - 1 - undone)):
            # of layer LAYERS - 1 - undone; pairs of a block that were side by side: 2^undone for each m
            bit = (row[:, None, None] * LAYERS + (LAYERS - 1 - undone)) * (groups * DIM // 2)
            bit += block * ((groups * DIM) >> (LAYERS - undone))
            bit += m << undone
            swaps = tl.load(mask + (bit >> 3), held, other=0).to(tl.int32) >> (bit & 7).to(tl.int32)
            for t in tl.static_range(1 << undone):
                small = found[((2 * block) << undone) + t]
                large = found[((2 * block + 1) << undone) + t]
                less = ((swaps >> t) & 1) == 1
                made = made + (tl.where(less, small, large), tl.where(less, large, small))
        found = made
    return found
