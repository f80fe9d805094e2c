"""Products with two thin factors in plain torch: what the kernels mean."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.payload.blocks import row_blocks, shape_of


def multiply(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `(x R) Lᵀ` in the dtype of `x`: one block of rows of R or L as float32 at a time."""
    wide = x.to(torch.float32)
    middle = torch.zeros(*x.shape[:-1], right.shape[1], dtype=torch.float32, device=x.device)
    for block in row_blocks(shape_of(right)):
        middle += wide[..., block] @ right[block].to(torch.float32)
    out = torch.empty(*x.shape[:-1], left.shape[0], dtype=torch.float32, device=x.device)
    for block in row_blocks(shape_of(left)):
        out[..., block] = middle @ left[block].to(torch.float32).T
    return out.to(x.dtype)
