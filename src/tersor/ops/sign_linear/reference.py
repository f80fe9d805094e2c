"""The meaning of `sign_linear` in plain torch: one block of rows dense at a time, float32."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.payload import codes
from tersor.payload.blocks import row_blocks


def sign_linear(first_x: Tensor, second_x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor,
                first_levels: int, second_levels: int) -> Tensor:
    """Return (batch, rows), float32; arguments as of the op."""
    wide, rows = levels.to(torch.float32), scales.shape[0]
    parts = ((first_x, first, codes.mirrored(wide[: first_levels // 2], first_levels), first_levels),
             (second_x, second, codes.mirrored(wide[first_levels // 2 :], second_levels), second_levels))
    out = torch.zeros(first_x.shape[0], rows, dtype=torch.float32, device=first_x.device)
    scale = scales.to(torch.float32)
    for x, packed, table, size in parts:
        for block in row_blocks((rows, x.shape[1])):
            chosen = codes.read(packed, (rows, x.shape[1]), size, block).to(torch.int32)
            out[:, block] += x.to(torch.float32) @ (table[chosen] * scale[block].unsqueeze(1)).T
    return out


def gradient(incoming: Tensor, packed: Tensor, half: Tensor, scales: Tensor, size: int, width: int) -> Tensor:
    """Return `incoming (s a[S])`, (batch, width) float32, for the codes and positive levels of one basis."""
    shape, table = (scales.shape[0], width), codes.mirrored(half.to(torch.float32), size)
    scaled = incoming.to(torch.float32) * scales.to(torch.float32)
    total = torch.zeros(incoming.shape[0], width, dtype=torch.float32, device=incoming.device)
    for block in row_blocks(shape):
        total += scaled[:, block] @ table[codes.read(packed, shape, size, block).to(torch.int32)]
    return total
