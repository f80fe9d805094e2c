"""Which matrices the kernels take, and in what pieces."""

from __future__ import annotations

import dataclasses

import torch

from tersor.ops.product_linear.codewords import Codewords
from tersor.payload.layout import radix_word

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_DIM = 16
MOST_LAYERS = 3
MOST_BOOK = 2**31  # numbers of codebooks or tables, so that places within them fit in 32 bits
LOOK_UP_BATCH = 2  # vectors up to which products are looked up
BATCH = 8  # vectors up to which codewords are multiplied as they are found; beyond, W is decoded in blocks of rows
BLOCK = 1 << 24  # weights of such a block: 32 MB of 16 bits, which stay in the cache for the product
EXACT = 11  # bits of integers that float16 holds
FULL, FULL_LOOK_UP = 4, 2  # programs a multiprocessor: their splits share its first cache


def refusal(matrix: Codewords, width: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels do not take a matrix, or None."""
    dim, groups = matrix.dim, width // matrix.dim
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    if dim > MOST_DIM or dim & (dim - 1):
        return f"codewords of {dim} numbers are not of a power of two up to {MOST_DIM}"
    if matrix.layers > MOST_LAYERS:
        return f"{matrix.layers} layers of swaps are above {MOST_LAYERS}"
    if matrix.layers and (groups % (1 << matrix.layers) or (width >> matrix.layers) % 8):
        return f"blocks of {width >> matrix.layers} after {matrix.layers} layers of swaps are no multiple of {dim}, 8"
    if matrix.levels & (matrix.levels - 1):
        return f"codebooks of {matrix.levels} levels, no power of two"
    if matrix.books * matrix.words * dim >= MOST_BOOK:
        return f"codebooks of {matrix.books * matrix.words * dim} numbers are beyond {MOST_BOOK}"
    return None


@dataclasses.dataclass(frozen=True)
class Division:
    """How a product is cut.

    Attributes
    ----------
    rows : int
        Of a tile.
    groups : int
        Of a tile, in each block that swaps make.
    splits : int
        Parts that the groups are cut in, one tile wide each: their sums are added last.
    chunk : int
        Tiles of rows that a program takes one after the other.
    programs : int
        For a split.
    warps : int
    """

    rows: int
    groups: int
    splits: int
    chunk: int
    programs: int
    warps: int


def division_of(rows: int, groups: int, layers: int, *, look_up: bool, dim: int, processors: int) -> Division:
    """Return how a product is cut with few vectors.

    A split's codewords, or products, are what the first cache of a multiprocessor has to hold while rows go by; so a
    program keeps its groups and takes many rows, and there are just enough programs to fill the device.
    """
    each = groups >> layers
    if look_up:
        tile, wide = 128, 32 if groups <= 1024 else 64
    else:
        tile, wide = max(8, 128 // dim), max(8, 32 >> layers)
    wide = min(wide, max(1, 1 << (each - 1).bit_length()))
    splits, tiles = -(-each // wide), -(-rows // tile)
    chunk = max(1, tiles * splits // ((FULL_LOOK_UP if look_up else FULL) * processors))
    return Division(tile, wide, splits, chunk, -(-tiles // chunk), 8)


def radix(levels: int) -> tuple[int, int, int]:
    """Return (bits a code, digits a word, bytes a word) of packed codes; bits 0 where a word holds digits."""
    if levels & (levels - 1) == 0:
        return levels.bit_length() - 1, 1, 1
    nbytes, digits = radix_word(levels)
    return 0, digits, nbytes
