"""Format-stable pseudo-randomness.

Everything a decoder regenerates from a seed comes from here, so the recipe is part of the file format: it must never
change for an existing codec version. Torch's and NumPy's generators make no such promise across versions.

The generator is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) used as a counter-based hash.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def words(seed: int, stream: int, count: int) -> np.ndarray:
    """Return `count` 64-bit words of stream `stream` under `seed`, as a uint64 array of shape (count,)."""
    with np.errstate(over="ignore"):
        base = _mix(np.array([seed & (2**64 - 1)], dtype=np.uint64) + _GOLDEN)
        base = _mix(base ^ (np.uint64(stream) * _GOLDEN + _GOLDEN))
        counter = np.arange(1, count + 1, dtype=np.uint64)
        return _mix(base + counter * _GOLDEN)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def signs(seed: int, stream: int, count: int) -> Tensor:
    """Return `count` random signs as a float32 tensor of +1 and -1: the top bit of each word."""
    top = (words(seed, stream, count) >> np.uint64(63)).astype(np.float32)
    return torch.from_numpy(1.0 - 2.0 * top)


def uniforms(seed: int, stream: int, count: int) -> np.ndarray:
    """Return `count` float64 numbers in the open interval (0, 1), 53 random bits each."""
    return ((words(seed, stream, count) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def permutation(seed: int, stream: int, count: int) -> Tensor:
    """Return a random permutation of range(count) as int64: the stable order of the stream's words."""
    return torch.from_numpy(np.argsort(words(seed, stream, count), kind="stable").astype(np.int64))
