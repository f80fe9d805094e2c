"""Signs of rotations on a device, made once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tersor import rng
from tersor.rotation import Rotation


@lru_cache(maxsize=128)
def signs_on(rotation: Rotation, device: torch.device) -> Tensor:
    """Return the signs that the rotation begins with, bfloat16 (width,)."""
    return rng.signs(rotation.seed, 0, rotation.width).to(device, torch.bfloat16)
