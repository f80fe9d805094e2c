"""What kernels need of a device: memory that they write to between launches, and how many processors there are."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> Tensor:
    """Return an uninitialized tensor.

    Raises
    ------
    torch.OutOfMemoryError
        If the device has no room; says how many bytes were asked, and for what.
    """
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        asked = math.prod(shape) * dtype.itemsize
        raise torch.OutOfMemoryError(f"{device} has no room for {asked:,} bytes of {what}; free memory, or multiply "
                                     f"fewer vectors at a time") from error


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
