"""The rotation in plain torch: what the kernels mean."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation


def rotate(x: Tensor, rotation: Rotation, inverse: bool, dtype: torch.dtype) -> Tensor:
    """Return `x` rotated, or rotated back, in float32, along windows of the last dimension; contiguous."""
    if not x.numel():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    windows = x.to(torch.float32).reshape(-1, rotation.width).contiguous()  # strides change how some machines sum
    turned = rotation.inverse(windows) if inverse else rotation.forward(windows)
    return turned.reshape(x.shape).to(dtype).contiguous()
