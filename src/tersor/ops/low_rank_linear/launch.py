"""Products of few vectors with two thin factors on CUDA: partial sums of the middle vectors, then the outputs.

See README.md for why these are two launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.ops.low_rank_linear.shapes import BATCH, plan_of
from tersor.ops.workspace import multiprocessors, workspace


@triton.jit
def _gather(x, right, partial, inputs, rank, steps, COUNT: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr):
    # partial[split, b, c]: x[b] times some rows of R
    split = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    start = split.to(tl.int64) * steps * BI + tl.arange(0, BI)
    total = tl.zeros([COUNT, BC], tl.float32)
    number = tl.arange(0, COUNT)[:, None]
    for step in range(steps):
        row = start + step * BI
        tile = tl.load(right + row[:, None] * rank + column[None, :],
                       (row < inputs)[:, None] & (column < rank)[None, :], other=0.0).to(tl.float32)
        for b in tl.static_range(COUNT):
            part = tl.load(x + row + b * inputs, row < inputs, other=0.0).to(tl.float32)
            found = tl.sum(tile * part[:, None], 0)[None, :]
            if COUNT == 1:
                total += found
            else:
                total += tl.where(number == b, found, 0.0)
    place = (split.to(tl.int64) * COUNT + number) * rank + column[None, :]
    tl.store(partial + place, total, (column < rank)[None, :] & (number >= 0))


@triton.jit
def _spread(partial, left, out, outputs, rank, splits, COUNT: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
            BS: tl.constexpr):
    # out[b, o] = Σ_c L[o, c] Σ_split partial[split, b, c]
    row = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    number = tl.arange(0, COUNT)[:, None]
    total = tl.zeros([COUNT, BO], tl.float32)
    for start in range(0, rank, BC):
        column = start + tl.arange(0, BC)
        tile = tl.load(left + row[:, None] * rank + column[None, :],
                       (row < outputs)[:, None] & (column < rank)[None, :], other=0.0).to(tl.float32)
        for b in tl.static_range(COUNT):
            middle = tl.zeros([BC], tl.float32)
            for first in range(0, splits, BS):
                split = first + tl.arange(0, BS)
                place = (split[:, None] * COUNT + b) * rank + column[None, :]
                middle += tl.sum(tl.load(partial + place, (split < splits)[:, None] & (column < rank)[None, :],
                                         other=0.0), 0)
            found = tl.sum(tile * middle[None, :], 1)[None, :]
            if COUNT == 1:
                total += found
            else:
                total += tl.where(number == b, found, 0.0)
    place = number.to(tl.int64) * outputs + row[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), (row < outputs)[None, :] & (number >= 0))


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
    plan = plan_of(outputs, x.shape[1], rank, multiprocessors(x.device))
    count = triton.next_power_of_2(batch)
    if count > batch:  # rows that a kernel's tile has beyond those of x
        x = torch.cat([x, x.new_zeros(count - batch, x.shape[1])])
    partial = workspace((plan.splits, count, rank), torch.float32, x.device, "partial sums")
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    _gather[(plan.splits, triton.cdiv(rank, plan.columns))](x, right, partial, x.shape[1], rank, plan.steps, count,
                                                            plan.inputs, plan.columns, num_warps=4)
    _spread[(triton.cdiv(outputs, plan.outputs),)](partial, left, out, outputs, rank, plan.splits, count, plan.outputs,
                                                   plan.columns, 16, num_warps=4)
    return out[:batch]
