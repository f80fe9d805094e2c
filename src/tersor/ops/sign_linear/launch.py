"""Two-basis codes times few vectors on CUDA: the kernels of `codebook_linear` over two streams of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch.choose import decodes, multiply_into
from tersor.ops.codebook_linear.launch.decoded import by_decoding
from tersor.ops.codebook_linear.launch.one import multiply_one_into, vector_tiling
from tersor.ops.codebook_linear.launch.operand import Around, Operand
from tersor.ops.codebook_linear.shapes.one import known_form
from tersor.payload.codes import mirrored

Pair = tuple[Tensor, Tensor]


def sign_linear(vectors: Pair, packed: Pair, levels: Tensor, scales: Tensor, sizes: tuple[int, int], *,
                dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (batch, rows) in `dtype`; arguments as of the op, those of the two bases as pairs."""
    batch, rows, device = vectors[0].shape[0], scales.shape[0], vectors[0].device
    near = [x if x.stride(-1) == 1 else x.contiguous() for x in vectors]
    halves = levels[: sizes[0] // 2], levels[sizes[0] // 2 :]
    operands = [_operand(x, codes, half, size)
                for x, codes, half, size in zip(near, packed, halves, sizes, strict=True)]
    with torch.cuda.device(device):
        if decodes(operands, scales, None):
            full = (mirrored(half, size) for half, size in zip(halves, sizes, strict=True))
            parts = [by_decoding(Operand(x, codes, table, size.bit_length() - 1), scales, None, x.shape[1])
                     for x, codes, table, size in zip(near, packed, full, sizes, strict=True)]
            return parts[0].to(torch.float32).add_(parts[1]).to(dtype)
        out = torch.empty(batch, rows, dtype=dtype, device=device)
        multiply_into(out, operands, scales, None, max(x.shape[1] for x in near))
    return out


def _operand(x: Tensor, packed: Tensor, half: Tensor, size: int) -> Operand:
    bits = size.bit_length() - 1
    return Operand(x, packed, half, bits, known_form(bits, "symmetric"))


def rotated_sign_linear(x: Tensor, packed: Pair, levels: Tensor, scales: Tensor, sizes: tuple[int, int],
                        rotations: tuple[Rotation, Rotation]) -> Tensor | None:
    """Return (1, rows) in the dtype of `x`, a vector that the same kernel rotates, or None where it does not."""
    if len(x) != 1:
        return None
    halves = levels[: sizes[0] // 2], levels[sizes[0] // 2 :]
    operands = [_operand(x.contiguous(), codes, half, size)
                for codes, half, size in zip(packed, halves, sizes, strict=True)]
    tiling = vector_tiling(operands, scales.shape[0], rotated=True)
    if tiling is None:
        return None
    out = torch.empty(1, scales.shape[0], dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        multiply_one_into(out, operands, [scales], tiling, Around(rotations))
    return out
