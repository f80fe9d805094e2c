"""Products of few vectors: tables of products, or codewords multiplied as they are found."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel
from tersor.ops.product_linear.kernels.packed import bits_at
from tersor.ops.product_linear.kernels.weights import affine, weights


@kernel
@triton.jit
def make_products(x, books, scale, offset, tables, groups, last, WORDS: tl.constexpr, DIM: tl.constexpr,
                  SHARED: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
                  SHIFTED: tl.constexpr, BW: tl.constexpr):
    """Write tables[b, g, w] = x[b, g] · book[g, w]."""
    group = tl.program_id(0)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    d = tl.arange(0, DIM)
    factor, shift = affine(scale, offset, 0.0, SCALED, SHIFTED)
    book = 0 if SHARED else group.to(tl.int64) * WORDS
    place = (book + word)[:, None] * DIM + d[None, :]
    inside = (word < WORDS)[:, None]
    if WIDTH > 0:
        number = bits_at(books, place, last, WIDTH, inside & (d >= 0)[None, :]).to(tl.float32)
    else:
        number = tl.load(books + place, inside, other=0.0).to(tl.float32)
    value = number * factor + shift
    for b in tl.static_range(BATCH):
        row = (b * groups + group).to(tl.int64)
        part = tl.load(x + row * DIM + d).to(tl.float32)
        tl.store(tables + row * WORDS + word, tl.sum(value * part[None, :], 1), word < WORDS)


@kernel
@triton.jit
def add_products(codes, tables, partial, rows, groups, last, chunk, WORDS: tl.constexpr, BITS: tl.constexpr,
                 BATCH: tl.constexpr, BR: tl.constexpr, MG: tl.constexpr):
    """Write partial[split, b, r]: products of a split of groups, summed; a program takes `chunk` tiles of rows."""
    split = tl.program_id(0)
    group = split * MG + tl.arange(0, MG)
    start = tl.program_id(1) * chunk
    r = tl.arange(0, BR)
    known = (group < groups)[None, :]
    place = (start * BR + r).to(tl.int64)[:, None] * groups + group[None, :]
    code = bits_at(codes, place, last, BITS, known & (start * BR + r < rows)[:, None])
    for step in range(start, start + chunk):
        row = step * BR + r
        inside = known & (row < rows)[:, None]
        after = (row + BR).to(tl.int64)
        ahead = bits_at(codes, after[:, None] * groups + group[None, :], last, BITS, known & (after < rows)[:, None])
        for b in tl.static_range(BATCH):
            book = (b * groups + group).to(tl.int64)[None, :] * WORDS
            found = tl.load(tables + book + code, inside, other=0.0)
            out = (split * BATCH + b).to(tl.int64) * rows + row
            tl.store(partial + out, tl.sum(found, 1), row < rows)
        code = ahead


@kernel
@triton.jit
def multiply_words(x, codes, books, mask, scale, offset, partial, rows, groups, last, chunk, middle: tl.constexpr,
                   WORDS: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, LAYERS: tl.constexpr,
                   BITS: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, BATCH: tl.constexpr,
                   BR: tl.constexpr, MG: tl.constexpr):
    """Write partial[split, b, r]: x times the weights of a split; a program takes `chunk` tiles of rows."""
    split = tl.program_id(0)
    group = split * MG + tl.arange(0, MG)
    start = tl.program_id(1) * chunk
    known = (group < (groups >> LAYERS))[None, :]
    m = group.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    here = (group < (groups >> LAYERS))[:, None] & (m >= 0)
    factor, shift = affine(scale, offset, middle, SCALED, SHIFTED)
    for step in range(start, start + chunk):
        row = step * BR + tl.arange(0, BR)
        inside = known & (row < rows)[:, None]
        found = weights(codes, books, mask, factor, shift, row.to(tl.int64), group, inside, groups, last, WORDS, DIM,
                        SHARED, LAYERS, BITS)
        for b in tl.static_range(BATCH):
            at = (m << LAYERS) + b * groups * DIM
            total = tl.zeros([BR, MG, DIM], tl.float32)
            for t in tl.static_range(1 << LAYERS):
                total += found[t] * tl.load(x + at + t, here, other=0.0).to(tl.float32)[None, :, :]
            out = (split * BATCH + b).to(tl.int64) * rows + row
            tl.store(partial + out, tl.sum(tl.sum(total, 2), 1), row < rows)


@kernel
@triton.jit
def add_splits(partial, out, count, splits, BLOCK: tl.constexpr):
    """Write the sum of `splits` arrays of `count` numbers each, in their order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    at = place
    for _ in range(splits):
        total += tl.load(partial + at, place < count, other=0.0)
        at += count
    tl.store(out + place, total.to(out.dtype.element_ty), place < count)
