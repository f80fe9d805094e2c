"""Two-basis codes times few vectors on CUDA: the kernel of `codebook_linear` over two streams of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch.choose import (
    Around,
    Operand,
    by_decoding,
    known_form,
    multiply_into,
    multiply_one_into,
    vector_tiling,
)
from tersor.ops.codebook_linear.shapes.limits import MOST_COLUMNS
from tersor.payload.codes import mirrored


def sign_linear(first_x: Tensor, second_x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor,
                first_levels: int, second_levels: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (batch, rows) in `dtype`; arguments as of the op."""
    batch, rows = first_x.shape[0], scales.shape[0]
    near = [x if x.stride(-1) == 1 else x.contiguous() for x in (first_x, second_x)]
    halves = levels[: first_levels // 2], levels[first_levels // 2 :]
    sizes = first_levels, second_levels
    with torch.cuda.device(first_x.device):
        if batch > MOST_COLUMNS:
            full = (mirrored(half, size) for half, size in zip(halves, sizes, strict=True))
            parts = [by_decoding(Operand(x, packed, table, size.bit_length() - 1), scales, None, x.shape[1])
                     for x, packed, table, size in zip(near, (first, second), full, sizes, strict=True)]
            return parts[0].to(torch.float32).add_(parts[1]).to(dtype)
        out = torch.empty(batch, rows, dtype=dtype, device=first_x.device)
        operands = [_operand(x, packed, half, size)
                    for x, packed, half, size in zip(near, (first, second), halves, sizes, strict=True)]
        multiply_into(out, operands, scales, None, max(x.shape[1] for x in near))
    return out


def _operand(x: Tensor, packed: Tensor, half: Tensor, size: int) -> Operand:
    bits = size.bit_length() - 1
    return Operand(x, packed, half, bits, known_form(bits, "symmetric"))


def rotated_sign_linear(x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor, first_levels: int,
                        second_levels: int, rotations: tuple[Rotation, Rotation]) -> Tensor | None:
    """Return (1, rows) in the dtype of `x`, a vector that the same kernel rotates, or None where it does not."""
    if len(x) != 1:
        return None
    halves = levels[: first_levels // 2], levels[first_levels // 2 :]
    operands = [_operand(x.contiguous(), packed, half, size) for packed, half, size in
                zip((first, second), halves, (first_levels, second_levels), strict=True)]
    tiling = vector_tiling(operands, scales.shape[0], rotated=True)
    if tiling is None:
        return None
    out = torch.empty(1, scales.shape[0], dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        multiply_one_into(out, operands, [scales], tiling, Around(rotations))
    return out
