"""Tokens to codes and scales on CUDA, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.constants import kept
from tersor.ops.kv_encode.kernels.encoding import encode as kernel
from tersor.ops.kv_encode.kernels.naming import name as namer
from tersor.ops.kv_encode.shapes import ROWS
from tersor.payload.words import Naming


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


def name(states: Tensor, naming: Naming, block: int) -> tuple[Tensor, Tensor]:
    """Return bytes and the flag; see the op."""
    batch, heads, tokens, dim = states.shape
    blocks, device, count = tokens // block, states.device, len(naming.counts)
    wide = max(16, 1 << (dim - 1).bit_length())
    near = states if states.stride(3) == 1 else states.contiguous()
    with torch.cuda.device(device):
        codes = torch.empty(blocks, batch, heads * block, count, dtype=torch.uint8, device=device)
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        namer[(blocks * batch * heads * (block // ROWS), count)](
            near, naming.centre, naming.analysis, naming.words, naming.weights, _places(naming.counts, device), codes,
            flag, batch, *near.stride()[:3], heads, block, dim, wide, naming.words.shape[1], count, ROWS, num_warps=4)
    return codes, flag


@kept
def _places(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each byte's numbers begin, and how many they are: int32 (bytes, 2)."""
    starts = [sum(counts[:byte]) for byte in range(len(counts))]
    with torch.inference_mode(False):
        return torch.tensor(list(zip(starts, counts, strict=True)), dtype=torch.int32, device=device)
