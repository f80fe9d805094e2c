"""Seeded rotations of vectors: a program takes tiles of whole vectors, or one part of a long one, through two products.

A vector of N numbers is an array X (N1, G, N2); the rotation is signs, then A ⊗ H(G) ⊗ H(N2). A program computes one
of G parts: the signed sum of all parts of X, a tile, then A tile H(N2) on the tensor cores. Numbers of more than 8 bits
are sums of bfloat16 pieces, products of which are exact. See README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@triton.jit
def _fetch(x, signs, step, count, part, N1: tl.constexpr, P1: tl.constexpr, G: tl.constexpr, N2: tl.constexpr,
           VECTORS: tl.constexpr, INVERSE: tl.constexpr):
    # [VECTORS P1, N2]: vectors of this step one below the other, their parts added with signs
    row = tl.arange(0, VECTORS * P1)
    vector = step * VECTORS + row // P1
    i = row % P1
    start = vector.to(tl.int64) * (N1 * G * N2) + i * (G * N2)
    inside = ((vector < count) & (i < N1))[:, None]
    place = (i * (G * N2))[:, None] + tl.arange(0, N2)[None, :]
    offset = start[:, None] + tl.arange(0, N2)[None, :]
    if G == 1:
        return tl.load(x + offset, inside, other=0.0)
    else:
        total = tl.zeros([VECTORS * P1, N2], tl.float32)
        for g in tl.static_range(G):
            piece = tl.load(x + offset + g * N2, inside, other=0.0).to(tl.float32)
            if not INVERSE:
                piece *= tl.load(signs + place + g * N2, (i < N1)[:, None], other=0.0).to(tl.float32)
            both = part & g
            total += tl.where(((both >> 1) ^ both) & 1 == 1, -piece, piece)
        return total


@triton.jit
def _head(x):
    # the first 8 bits of each number, cut, not rounded: what is left is exact, and so is this in bfloat16
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _times(tile, right, PIECES: tl.constexpr):
    # tile @ right, the tile in so many pieces of the kind of `right`
    rest = tile
    out = tl.zeros([tile.shape[0], right.shape[1]], tl.float32)
    for _ in tl.static_range(1, PIECES):
        piece = _head(rest)
        out = tl.dot(piece.to(right.dtype), right, out)
        rest = rest - piece
    return tl.dot(rest.to(right.dtype), right, out)


@triton.jit
def _left(tile, first, left, P1: tl.constexpr, FACTOR: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr):
    # left @ tile: products of pieces whose places add up to less than PIECES; the rest is below rounding
    i = tl.arange(0, P1)
    rest = tile
    place = i[:, None] * P1 + i[None, :]
    out = tl.zeros([P1, tile.shape[1]], tl.float32)
    for p in tl.static_range(TILE):
        piece = rest
        if p + 1 < TILE:
            piece = _head(rest.to(tl.float32))
            rest = rest.to(tl.float32) - piece
        piece = piece.to(first.dtype)
        out = tl.dot(first, piece, out)
        for q in tl.static_range(1, FACTOR):
            if p + q < PIECES:
                out = tl.dot(tl.load(left + q * P1 * P1 + place), piece, out)
    return out


@kernel
@triton.jit(do_not_specialize=["count"])
def rotate_many(x, out, left, right, signs, count, scale, N1: tl.constexpr, P1: tl.constexpr, G: tl.constexpr,
                N2: tl.constexpr, VECTORS: tl.constexpr, INVERSE: tl.constexpr, FACTOR: tl.constexpr,
                TILE: tl.constexpr, PIECES: tl.constexpr):
    """Rotate vectors, or one of G parts of each: a program takes a step of VECTORS vectors after another."""
    tl.extra.cuda.gdc_launch_dependents()  # what follows may begin to load what it does not get from here
    part = tl.program_id(0)
    step = tl.program_id(1)
    steps = (count + VECTORS - 1) // VECTORS
    j = tl.arange(0, N2)
    h = tl.load(right + j[:, None] * N2 + j[None, :])
    k = tl.arange(0, P1)
    first = tl.load(left + k[:, None] * P1 + k[None, :])
    row = tl.arange(0, VECTORS * P1)
    # rows of the result are (i, vector) where there is a left factor, for there columns were (vector, j)
    i = row // VECTORS
    chosen = row % VECTORS
    place = (i * (G * N2))[:, None] + part * N2 + j[None, :]
    before = ((row % P1) * N2)[:, None] + j[None, :]
    if INVERSE:
        sign = tl.load(signs + place, (i < N1)[:, None], other=0.0)
    elif G == 1:
        sign = tl.load(signs + before, (row % P1 < N1)[:, None], other=0.0)
    # factors are older than the kernel before this one; x may be its result, and out what it still reads
    tl.extra.cuda.gdc_wait()
    tile = _fetch(x, signs, step, count, part, N1, P1, G, N2, VECTORS, INVERSE)
    while step < steps:
        following = step + tl.num_programs(1)
        if G == 1:  # on its way while this step computes
            ahead = _fetch(x, signs, following, count, part, N1, P1, G, N2, VECTORS, INVERSE)
        if G == 1 and not INVERSE:
            tile = tile * sign.to(tile.dtype)
        if P1 > 1:
            wide = tile
            if VECTORS > 1:
                wide = tl.reshape(tl.permute(tl.reshape(tile, [VECTORS, P1, N2]), [1, 0, 2]), [P1, VECTORS * N2])
            middle = _left(wide, first, left, P1, FACTOR, TILE, PIECES)
            y = _times(tl.reshape(middle, [P1 * VECTORS, N2]), h, PIECES)
        else:
            y = _times(tile, h, TILE)
        y *= scale
        if INVERSE:
            y *= sign.to(tl.float32)
        vector = step * VECTORS + chosen
        inside = ((vector < count) & (i < N1))[:, None]
        tl.store(out + (vector.to(tl.int64) * (N1 * G * N2))[:, None] + place, y.to(out.dtype.element_ty), inside)
        if G > 1:  # what computing needs leaves no registers to hold this one meanwhile
            ahead = _fetch(x, signs, following, count, part, N1, P1, G, N2, VECTORS, INVERSE)
        tile = ahead
        step = following
