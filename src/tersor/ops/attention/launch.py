"""Attention of one token on CUDA: the launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.ops.attention.kernels import one
from tersor.ops.attention.shapes import WARPS, block_of


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return what `attend_one` does."""
    (_, heads, _, size), (_, groups, places, _) = query.shape, key.shape
    query = query if query.stride(3) == 1 else query.contiguous()
    out = torch.empty(1, heads, 1, size, dtype=query.dtype, device=query.device)
    with torch.cuda.device(query.device):
        one.attend[(heads,)](query, key, value, mask, out, scale / math.log(2), query.stride(1), *key.stride()[1:3],
                             *value.stride()[1:3], mask.stride(3), places, heads // groups, size,
                             block_of(places, size, key.dtype), num_warps=WARPS, launch_pdl=True)
    return out
