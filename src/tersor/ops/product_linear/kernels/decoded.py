"""Rows of the matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel
from tersor.ops.product_linear.kernels.weights import affine, weights


@kernel
@triton.jit
def decode_words(codes, books, mask, scale, offset, out, first, rows, groups, last, middle: tl.constexpr,
                 WORDS: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, LAYERS: tl.constexpr, BITS: tl.constexpr,
                 SCALED: tl.constexpr, SHIFTED: tl.constexpr, BR: tl.constexpr, MG: tl.constexpr):
    """Write out[r, :]: rows `first` to `rows` of the matrix."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    group = tl.program_id(1) * MG + tl.arange(0, MG)
    row = first + r
    inside = (group < (groups >> LAYERS))[None, :] & (row < rows)[:, None]
    m = group[:, None] * DIM + tl.arange(0, DIM)[None, :]
    factor, shift = affine(scale, offset, middle, SCALED, SHIFTED)
    found = weights(codes, books, mask, factor, shift, row.to(tl.int64), group, inside, groups, last, WORDS, DIM,
                    SHARED, LAYERS, BITS)
    place = r.to(tl.int64)[:, None, None] * (groups * DIM) + (m << LAYERS)[None, :, :]
    held = inside[:, :, None] & (m >= 0)[None, :, :]
    for t in tl.static_range(1 << LAYERS):
        tl.store(out + place + t, found[t].to(out.dtype.element_ty), held)
