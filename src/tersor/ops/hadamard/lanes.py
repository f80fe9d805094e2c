"""Rotations of few vectors on the processor: arrays for compiled loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from tersor.numerics import rng
from tersor.numerics.linalg import paley
from tersor.numerics.rotation import Rotation, factor_orders
from tersor.ops.hadamard import reference
from tersor.ops.hadamard.kernels.butterflies import rotate
from tersor.ops.hadamard.shapes import LANE_VECTORS

MOST_ROWS = 20  # of a left factor: torch multiplies by larger ones faster


def ready(rotation: Rotation, *, inverse: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """Return what rotates float32 vectors (n, width); by torch back, without a left factor, or with a large one."""
    made = None if inverse else _factors(rotation)

    def by_torch(x: np.ndarray) -> np.ndarray:
        return reference.rotate(torch.from_numpy(x), rotation, inverse, torch.float32).numpy()

    def by_loops(x: np.ndarray) -> np.ndarray:
        if len(x) > LANE_VECTORS:
            return by_torch(x)
        assert made is not None
        out = np.empty(x.shape, np.float32)
        rotate(x, *made, out)
        return out

    return by_torch if made is None else by_loops


@lru_cache(maxsize=64)
def _factors(rotation: Rotation) -> tuple[np.ndarray, np.ndarray, np.float32] | None:
    """Return signs, the left factor, entries ±1, and the scale of the rotation."""
    orders = factor_orders(rotation.width)
    first = orders[0] if orders else 0
    left = np.ones((1, 1)) if first == 1 else paley(first) if first % 4 == 0 and 2 < first <= MOST_ROWS else None
    if left is None:
        return None
    signs = rng.signs(rotation.seed, 0, rotation.width).numpy()
    return signs, left.astype(np.float32), np.float32(1 / math.sqrt(rotation.width))
