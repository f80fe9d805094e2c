"""Products of few vectors with two thin factors: partial sums of the middle vectors, then the outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@kernel
@triton.jit
def gather(x, right, partial, inputs, rank, steps, COUNT: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr):
    """Write partial[split, b, c]: x[b] times some rows of R."""
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


@kernel
@triton.jit
def spread(partial, left, out, outputs, rank, splits, COUNT: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
           BS: tl.constexpr):
    """Write out[b, o] = Σ_c L[o, c] Σ_split partial[split, b, c]."""
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
