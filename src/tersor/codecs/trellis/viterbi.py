"""From numbers to the bits of their best path, and from states to bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter, segment_matrix
from tersor.numerics.constants import constant
from tersor.ops.trellis_path import Steps, states


@cache
def values(code: Filter) -> Tensor:
    """Return the number that every window gives, float32 (period, 2**memory)."""
    windows = torch.arange(1 << code.memory)
    signs = ((windows[None] >> torch.arange(code.memory)[:, None] & 1) * 2 - 1).to(torch.float64)
    return (code.taps_tensor() @ signs).to(torch.float32)


@constant
def values_on(code: Filter, device: torch.device) -> Tensor:
    """Return `values` on a device."""
    return values(code).to(device)


def encode(code: Filter, numbers: Tensor) -> Tensor:
    """Return the bits of tail-biting segments, uint8 (n, bits), for float32 numbers (n, length)."""
    length = numbers.shape[1]
    if code.bits(length) < code.memory:
        return _tiny(code, numbers)
    table = values_on(code, numbers.device)
    return bits_of(code, states(numbers, table, Steps(code.memory, code.shifts, linear=True)))


def bits_of(code: Filter, path: Tensor) -> Tensor:
    """Return the bits that entered at each step of a path, oldest first, uint8 (n, bits)."""
    step, age = _entering(code.shifts, path.shape[1], path.device)
    return (path[:, step] >> age).bitwise_and_(1).to(torch.uint8)


@constant
def _entering(shifts: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """Return at which step every bit of a stream entered, and how old it was after it, int32 (2, bits)."""
    counts = torch.tensor(shifts).repeat(-(-length // len(shifts)))[:length]
    step = torch.arange(length).repeat_interleave(counts)
    age = counts.cumsum(0)[step] - 1 - torch.arange(int(counts.sum()))
    return torch.stack([step, age]).to(torch.int32).to(device)


def _tiny(code: Filter, numbers: Tensor) -> Tensor:
    """Encode segments whose stream is shorter than the window: flip bits while that lowers the error."""
    matrix = segment_matrix(code, numbers.shape[1]).to(numbers.device)
    energy = matrix.square().sum(0)
    signs = torch.where(numbers @ matrix >= 0, 1.0, -1.0)
    for _ in range(4 * matrix.shape[1]):
        gain = signs * ((numbers - signs @ matrix.T) @ matrix) + energy  # half of what a flip lowers the error by, less
        worst = gain.argmin(1, keepdim=True)
        flip = gain.gather(1, worst) < 0
        if not bool(flip.any()):
            break
        signs.scatter_(1, worst, torch.where(flip, -1.0, 1.0) * signs.gather(1, worst))
    return (signs > 0).to(torch.uint8)
