"""Tokens to codes and scales on CUDA, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.kv_encode.kernels.encoding import encode as kernel
from tersor.ops.kv_encode.shapes import ROWS


def encode(states: Tensor, table: Tensor | None, maps: Tensor | None, bits: int, block: int,
           refits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and the flag; see the op."""
    batch, heads, tokens, dim = states.shape
    blocks, device = tokens // block, states.device
    near = states if states.stride(3) == 1 else states.contiguous()
    with torch.cuda.device(device):
        codes = torch.empty(blocks, batch, heads * block * dim * bits // 8, dtype=torch.uint8, device=device)
        scales = torch.empty(blocks, batch, heads * block, dtype=torch.bfloat16, device=device)
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        kernel[(blocks * batch * heads * (block // ROWS),)](
            near, maps if maps is not None else near, table if table is not None else near, codes, scales, flag, batch,
            *near.stride()[:3], heads, block, dim, bits, refits, maps is not None, ROWS, num_warps=8)
    return codes, scales, flag
