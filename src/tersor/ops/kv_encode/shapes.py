"""Which tokens the kernel encodes."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
DIMS = (32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 32  # tokens of a program
MOST_NAMED = 256  # dimension of tokens that name words


def refusal(states: Tensor, bits: int, block: int) -> str | None:
    """Return why the kernel does not take this, or None."""
    if bits not in BITS or states.shape[3] not in DIMS:
        return f"it takes codes of {BITS} bits and dimensions of {DIMS}, found {bits} and {states.shape[3]}"
    if states.dtype not in DTYPES or block % ROWS:
        return f"it takes 16 or 32-bit floats in blocks of a multiple of {ROWS}, found {states.dtype} and {block}"
    return None


def unnamed(states: Tensor, block: int) -> str | None:
    """Return why the kernel does not name this, or None."""
    if states.shape[3] > MOST_NAMED:
        return f"it takes dimensions of at most {MOST_NAMED}, found {states.shape[3]}"
    if states.dtype not in DTYPES or block % ROWS:
        return f"it takes 16 or 32-bit floats in blocks of a multiple of {ROWS}, found {states.dtype} and {block}"
    return None
