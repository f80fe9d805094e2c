"""Products of many vectors: blocks of rows are decoded, then multiplied by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.codebook_linear.kernels.decoded import decode_rows
from tersor.ops.codebook_linear.launch.operand import Operand
from tersor.ops.workspace import workspace

DECODE_BYTES = 1 << 26  # of decoded rows at a time, where vectors are many
DECODE_BLOCK = 2048  # numbers that a program decodes


def by_decoding(operand: Operand, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """Return x Wᵀ, (batch, rows), by blocks of rows decoded to the dtype of `x`."""
    x, width, rows = operand.x, operand.x.shape[1], scales.shape[0]
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    step = max(1, DECODE_BYTES // (width * x.element_size()) // 128 * 128)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        torch.mm(x, decode(operand, scales, zeros, slice(start, stop), group).T, out=out[:, start:stop])
    return out


def decode(operand: Operand, scales: Tensor, zeros: Tensor | None, rows: slice, group: int) -> Tensor:
    """Return decoded rows in the dtype of `x`, (k, width)."""
    width = operand.x.shape[1]
    grouped = group < width or zeros is not None
    count = (rows.stop - rows.start) * width
    dense = workspace((rows.stop - rows.start, width), operand.x.dtype, operand.x.device, "decoded rows")
    decode_rows[(-(-count // DECODE_BLOCK),)](
        operand.codes, operand.table, scales, scales if zeros is None else zeros, dense, rows.start, width,
        scales.shape[-1] if grouped else 1, scales.stride(0), count, operand.bits,
        group if grouped else 0, zeros is not None, DECODE_BLOCK)
    return dense
