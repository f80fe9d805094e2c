"""Scales of groups: fitted, bounded, inverted."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.payload.blocks import row_blocks, shape_of


def reciprocal(scales: Tensor) -> Tensor:
    """Return 1 / scale in float32, 0 where the scale is 0."""
    wide = scales.to(torch.float32)
    return torch.where(wide > 0, 1.0 / wide, torch.zeros_like(wide)).clamp_max(torch.finfo(torch.float32).max)


def rms(groups: Tensor) -> Tensor:
    """Return the root mean square along the last dimension of float32 groups, whatever their magnitude."""
    peak = groups.abs().amax(-1, keepdim=True)
    safe = torch.where(peak > 0, peak, torch.ones_like(peak))  # squares of huge and tiny values stay in range
    return (groups / safe).square_().mean(-1).sqrt_() * safe.squeeze(-1)


def row_rms(matrix: Tensor) -> Tensor:
    """Return the root mean square of every row of a matrix (out, in), float32 (out,), a block of rows at a time."""
    return torch.cat([rms(matrix[block].to(torch.float32)) for block in row_blocks(shape_of(matrix))])


def bounded(scales: Tensor) -> Tensor:
    """Return scales as finite bf16."""
    return scales.to(torch.bfloat16).clamp_max(torch.finfo(torch.bfloat16).max)
