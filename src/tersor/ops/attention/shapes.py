"""Which shapes the kernel takes, and how it divides them."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # places of which a program holds keys and values in registers, at most
HELD = 32768  # numbers of keys in registers, at most
WARPS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (16, 32, 64, 128, 256)  # of a head


def block_of(places: int, size: int, dtype: torch.dtype) -> int:
    """Return the places of a block: a power of two, as many as registers hold."""
    return min(BLOCK, HELD * 2 // (size * dtype.itemsize), max(16, 1 << (places - 1).bit_length()))


def refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> str | None:
    """Return why the kernel does not take tensors, or None."""
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype} or mask.dtype != torch.bool:
        return f"queries, keys, values, mask of {query.dtype}, {key.dtype}, {value.dtype}, {mask.dtype}"
    if query.shape[3] not in SIZES:
        return f"heads of {query.shape[3]} numbers, not one of {SIZES}"
    if key.stride(3) != 1 or value.stride(3) != 1:
        return "numbers of a key or value that do not lie together"
    return None
