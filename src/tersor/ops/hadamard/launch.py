"""Seeded rotations on CUDA: a program takes tiles of whole vectors, or one part of a long one, through two products.

A vector of N numbers is an array X (N1, G, N2); the rotation is signs, then A ⊗ H(G) ⊗ H(N2). A program computes one
of G parts: the signed sum of all parts of X, a tile, then A tile H(N2) on the tensor cores. Numbers of more than 8 bits
are sums of bfloat16 pieces, products of which are exact. See README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.hadamard.kernels.few import rotate_few
from tersor.ops.hadamard.shapes import (
    FEW,
    FEW_PROGRAMS,
    NARROW_TILE,
    SMALL_TILE,
    WIDE_TILE,
    FewTile,
    factors,
    few_tile,
    registers_of,
    tile_of,
)
from tersor.ops.workspace import multiprocessors


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


@triton.jit(do_not_specialize=["count"])
def _rotate(x, out, left, right, signs, count, scale, N1: tl.constexpr, P1: tl.constexpr, G: tl.constexpr,
            N2: tl.constexpr, VECTORS: tl.constexpr, INVERSE: tl.constexpr, FACTOR: tl.constexpr, TILE: tl.constexpr,
            PIECES: tl.constexpr):
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


def rotate(x: Tensor, rotation: Rotation, inverse: bool, dtype: torch.dtype) -> Tensor:
    """Return `x` rotated, or rotated back, along windows of the last dimension, in `dtype`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    count = x.numel() // rotation.width
    if not count:
        return out
    with torch.cuda.device(x.device):
        few = few_tile(rotation.width)
        if few is not None and count <= min(FEW, FEW_PROGRAMS // few.parts):
            _few_into(out, x.contiguous(), rotation, inverse, few)
        else:
            _many_into(out, x.contiguous(), rotation, inverse)
    return out


def _few_into(out: Tensor, x: Tensor, rotation: Rotation, inverse: bool, tile: FewTile) -> None:
    # told that registers abound, the compiler starts all loads before it waits for the first
    made, most = factors(rotation, tile, inverse, x.dtype, x.device), registers_of(tile.warps)
    rotate_few[(tile.parts, x.numel() // rotation.width)](
        x, out, made.left, made.signs, made.scale, tile.rows, tile.padded, tile.parts, tile.columns, tile.warps,
        inverse, _most(out.dtype), num_warps=tile.warps, maxnreg=most, launch_pdl=True)


def _many_into(out: Tensor, x: Tensor, rotation: Rotation, inverse: bool) -> None:
    count = x.numel() // rotation.width
    narrow = max(x.dtype.itemsize, out.dtype.itemsize) == 2
    tile = tile_of(rotation.width, SMALL_TILE if count <= FEW else NARROW_TILE if narrow else WIDE_TILE)
    assert tile is not None
    made = factors(rotation, tile, inverse, x.dtype, x.device)
    most = max(1, tile.resident(narrow) * multiprocessors(x.device) // tile.parts)
    programs = min(-(-count // tile.vectors), most)
    _rotate[(tile.parts, programs)](
        x, out, made.left, made.right, made.signs, count, made.scale, tile.rows, tile.padded, tile.parts, tile.columns,
        tile.vectors, inverse, *pieces(x.dtype, out.dtype, made.left, tile.parts), num_warps=tile.warps, num_stages=1,
        maxnreg=tile.registers(narrow), launch_pdl=True)


def _most(wanted: torch.dtype) -> int:
    """Return in how many pieces a number in float32 is multiplied on the way to a result."""
    return 3 if wanted == torch.float32 else 2


def pieces(given: torch.dtype, wanted: torch.dtype, left: Tensor, parts: int) -> tuple[int, int, int]:
    """Return in how many pieces the left factor, the tile as it is read, and the middle are multiplied.

    Two leave an error of 2^-17 relative, for results of 16 bits; three, of 2^-25, for float32. A bfloat16 is one piece,
    a float16 is one where the factor is exact in float16, else two.
    """
    most = _most(wanted)
    if parts > 1 or given == torch.float32:
        tile = most
    else:
        tile = 2 if given == torch.float16 and left.dtype == torch.bfloat16 else 1
    return min(left.shape[0], most), tile, most

