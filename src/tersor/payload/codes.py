"""One packed code an element: written by blocks of rows, read by rows or at random."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tersor.payload import packing
from tersor.payload.blocks import Rows, Shape, row_blocks
from tersor.payload.layout import packed_nbytes, width_of


def write(shape: Shape, levels: int, device: torch.device, assign: Callable[[slice], Tensor]) -> Tensor:
    """Pack the codes that `assign` returns for each block of rows: a 1-D uint8 tensor."""
    packed = torch.empty(packed_nbytes(math.prod(shape), levels), dtype=torch.uint8, device=device)
    multiple = packing.group_codes(levels)
    for block in row_blocks(shape, multiple):
        part = packing.pack(assign(block), levels)
        first = packed_nbytes(block.start * shape[1], levels)
        packed[first : first + part.numel()] = part
    return packed


def read(packed: Tensor, shape: Shape, levels: int, rows: Rows) -> Tensor:
    """Return the codes of `rows`, (k, in)."""
    width = shape[1]
    if isinstance(rows, slice):
        return packing.unpack(packed, levels, rows.start * width, rows.stop * width).reshape(-1, width)
    bits = width_of(levels)
    if packed.device.type == "cpu" and bits is not None and width * bits % 8 == 0:  # rows are whole bytes
        held = packed[: packed_nbytes(shape[0] * width, levels)].view(shape[0], -1)[rows.to(packed.device)]
        return packing.unpack(held.reshape(-1), levels, 0, len(held) * width).reshape(-1, width)
    index = rows.to(packed.device).unsqueeze(-1) * width + torch.arange(width, device=packed.device)
    return packing.unpack_at(packed, levels, index)


def mirrored(half: Tensor, count: int) -> Tensor:
    """Return `count` symmetric levels in the order of their codes, from the positive ones, innermost first.

    Not sorted: a pair of levels that no element uses is fitted as 0, and codes must keep their meaning.
    """
    return torch.cat([-half.flip(0), *([half.new_zeros(1)] if count % 2 else []), half])
