"""Products with two thin factors: two launches for few vectors, torch for more. See README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.low_rank_linear.kernels.few import gather, spread
from tersor.ops.low_rank_linear.shapes import BATCH, division_of
from tersor.ops.workspace import multiprocessors, workspace


def multiply(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `(x R) Lᵀ` in the dtype of `x`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        if not flat.numel():
            out = torch.empty(flat.shape[0], left.shape[0], dtype=x.dtype, device=x.device)
        elif flat.shape[0] > BATCH:
            # the middle is rounded to the vectors' dtype, as between any two layers
            out = (flat @ right.to(x.dtype)) @ left.to(x.dtype).T
        else:
            out = _few(flat, left.contiguous(), right.contiguous())
    return out.reshape(*x.shape[:-1], left.shape[0])


def _few(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    batch, (outputs, rank) = x.shape[0], left.shape
    cut = division_of(outputs, x.shape[1], rank, multiprocessors(x.device))
    count = 1 << (batch - 1).bit_length()
    if count > batch:  # rows that a kernel's tile has beyond those of x
        x = torch.cat([x, x.new_zeros(count - batch, x.shape[1])])
    partial = workspace((cut.splits, count, rank), torch.float32, x.device, "partial sums")
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    gather[(cut.splits, -(-rank // cut.columns))](x, right, partial, x.shape[1], rank, cut.steps, count, cut.inputs,
                                                  cut.columns, num_warps=4)
    spread[(-(-outputs // cut.outputs),)](partial, left, out, outputs, rank, cut.splits, count, cut.outputs,
                                          cut.columns, 16, num_warps=4)
    return out[:batch]
