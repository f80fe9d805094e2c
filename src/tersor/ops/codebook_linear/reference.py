"""The meaning of `codebook_linear` in plain torch: one block of rows dense at a time, float32."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.payload import packing
from tersor.payload.blocks import row_blocks
from tersor.payload.codes import read
from tersor.payload.groups import Grid


def decoded(codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, shape: tuple[int, int], bits: int,
            group: int, rows: slice) -> Tensor:
    """Return the decoded rows, float32 (k, width); see `codebook_linear`."""
    grid = Grid(shape, group, "in")
    values = table.to(torch.float32)[read(codes, shape, 2**bits, rows).to(torch.int32)]
    if zeros is not None:
        count = shape[0] * grid.param_shape[1]
        points = packing.unpack(zeros, 2**bits, 0, count).reshape(grid.param_shape).to(torch.float32)
        values = values - grid.expand(points, rows)
    return values * grid.expand(scales.to(torch.float32), rows)


def gradient(incoming: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
             group: int, width: int) -> Tensor:
    """Return `incoming @ W`, (*batch, width) float32; the other arguments as of the op."""
    shape = scales.shape[0], width
    wide = incoming.to(torch.float32)
    total = torch.zeros(*incoming.shape[:-1], width, dtype=torch.float32, device=incoming.device)
    for block in row_blocks(shape):
        total += wide[..., block] @ decoded(codes, table, scales, zeros, shape, bits, group, block)
    return total


def codebook_linear(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
                    group: int) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`; arguments as of the op."""
    rows = scales.shape[0]
    shape = rows, x.shape[-1]
    wide = x.to(torch.float32)
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    for block in row_blocks(shape):
        out[..., block] = (wide @ decoded(codes, table, scales, zeros, shape, bits, group, block).T).to(x.dtype)
    return out
