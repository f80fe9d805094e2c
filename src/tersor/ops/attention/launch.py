"""Attention of one token on CUDA: one launch, or two where a cache is long. None waits for the processor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.ops.attention.kernels import one, parts
from tersor.ops.attention.shapes import ALONE, COLUMNS, PART_WARPS, STAGES, WARPS, block_of, division_of
from tersor.ops.workspace import multiprocessors, workspace


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return what `attend_one` does."""
    (batch, heads, _, size), (_, groups, places, _) = query.shape, key.shape
    query = query if query.stride(3) == 1 else query.contiguous()
    out = torch.empty(batch, heads, 1, size, dtype=query.dtype, device=query.device)
    factor = scale / math.log(2)
    known = (*_lines(batch, query)[:2], *_lines(batch, key)[:3], *_lines(batch, value)[:3], *_lines(batch, mask)[::3],
             places, groups, heads // groups, size)
    with torch.cuda.device(query.device):
        if places <= ALONE:
            one.attend[(heads, batch)](query, key, value, mask, out, factor, *known, block_of(places, size, key.dtype),
                                       num_warps=WARPS, launch_pdl=True)
            return out
        cut = division_of(places, heads // groups, batch * groups, size, key.dtype, multiprocessors(query.device))
        scores = workspace((2, batch * cut.parts * heads), torch.float32, query.device, "parts of attention")
        sums = workspace((batch * cut.parts * heads, size), torch.float32, query.device, "parts of attention")
        parts.attend_parts[(cut.parts, batch * groups, cut.tiles)](
            query, key, value, mask, scores[0], scores[1], sums, factor, *known, cut.parts, cut.turns, cut.scan,
            cut.block, cut.rows, num_warps=PART_WARPS, num_stages=STAGES, launch_pdl=True)
        columns = min(COLUMNS, size)
        parts.join_parts[(batch * heads, size // columns)](
            scores[0], scores[1], sums, out, heads // groups, size, cut.parts, cut.room, columns, num_warps=WARPS,
            launch_pdl=True)
    return out


def _lines(batch: int, x: Tensor) -> tuple[int, ...]:
    """Return strides of sequences, and of the dimensions after; a tensor of one sequence is that of all."""
    return (x.stride(0) if len(x) > 1 and batch > 1 else 0, *x.stride()[1:])
