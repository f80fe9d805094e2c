"""Seeded rotations on CUDA: which of the two kernels, and in how many pieces. See README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.hadamard.kernels.few import rotate_few
from tersor.ops.hadamard.kernels.many import rotate_many
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
    rotate_many[(tile.parts, programs)](
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
