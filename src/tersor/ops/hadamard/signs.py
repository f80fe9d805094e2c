"""Signs of rotations on a device, made once."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics import rng
from tersor.numerics.constants import kept
from tersor.numerics.rotation import Rotation


@kept
def signs_on(rotation: Rotation, device: torch.device) -> Tensor:
    """Return the signs that the rotation begins with, bfloat16 (width,), there before any later kernel begins."""
    made = rng.signs(rotation.seed, 0, rotation.width).to(device, torch.bfloat16)
    if device.type == "cuda":  # kernels read them before they wait for those before them
        torch.cuda.current_stream(device).synchronize()
    return made
