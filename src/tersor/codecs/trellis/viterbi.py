"""From numbers to the bits of their best path, and from states to bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter, segment_matrix
from tersor.ops.trellis_path import Steps, states


@cache
def values(code: Filter) -> Tensor:
    """Return the number that every window gives, float32 (period, 2**memory)."""
    windows = torch.arange(1 << code.memory)
    signs = ((windows[None] >> torch.arange(code.memory)[:, None] & 1) * 2 - 1).to(torch.float64)
    return (code.taps_tensor() @ signs).to(torch.float32)


def encode(code: Filter, numbers: Tensor) -> Tensor:
    """Return the bits of tail-biting segments, uint8 (n, bits), for float32 numbers (n, length)."""
    length = numbers.shape[1]
    if code.bits(length) < code.memory:
        return _tiny(code, numbers)
    table = values(code).to(numbers.device)
    return bits_of(code, states(numbers, table, Steps(code.memory, code.shifts, linear=True)))


def bits_of(code: Filter, path: Tensor) -> Tensor:
    """Return the bits that entered at each step of a path, oldest first, uint8 (n, bits)."""
    period = len(code.shifts)
    whole = path.shape[1] // period * period
    turns = [_entered(path[:, phase:whole:period], shift) for phase, shift in enumerate(code.shifts)]
    rest = [_entered(path[:, t, None], code.shifts[t - whole])[:, 0] for t in range(whole, path.shape[1])]
    return torch.cat([torch.cat(turns, 2).flatten(1), *rest], 1)


def _entered(path: Tensor, shift: int) -> Tensor:
    """Return the newest bits of states (n, steps), oldest first, uint8 (n, steps, shift)."""
    ages = torch.arange(shift - 1, -1, -1, dtype=path.dtype, device=path.device)
    return (path.unsqueeze(-1) >> ages & 1).to(torch.uint8)


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
