"""The best path through a trellis: plain torch, for any device; the processor's kernels are in `lanes.py`.

A state is the window as an integer, newest bit lowest. A step drops the `k` oldest bits and takes `k` new ones, so
states fall into groups that share what is kept: a group has 2**k states before, and 2**k after.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter

WARM = 48  # steps on either side of the seam after which paths have long merged
STATES_AT_ONCE = 1 << 27  # metrics held at a time in plain torch


@cache
def values(code: Filter) -> Tensor:
    """Return the number that every window gives, float32 (period, 2**memory)."""
    states = torch.arange(1 << code.memory)
    signs = ((states[None] >> torch.arange(code.memory)[:, None] & 1) * 2 - 1).to(torch.float64)
    return (code.taps_tensor() @ signs).to(torch.float32)


def encode(code: Filter, numbers: Tensor) -> Tensor:
    """Return the bits of tail-biting segments, uint8 (n, bits), for float32 numbers (n, length)."""
    length = numbers.shape[1]
    if code.bits(length) < code.memory:
        return _tiny(code, numbers)
    if numbers.device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        from tersor.codecs.trellis import lanes

        return lanes.encode(code, numbers)
    groups = (1 << code.memory) >> min(code.shifts)
    step = max(1, STATES_AT_ONCE // max(1 << code.memory, groups * length // 4))
    return torch.cat([_encode(code, part) for part in numbers.split(step)])


def _encode(code: Filter, numbers: Tensor) -> Tensor:
    length = numbers.shape[1]
    warm = min(WARM, length // 2)
    seam = [*range(length - warm, length), *range(warm)]
    free = torch.zeros(len(numbers), 1 << code.memory, device=numbers.device)
    states = _walk(code, numbers, free, seam, None)
    start = states[:, warm - 1]
    bound = torch.full_like(free, torch.inf).scatter_(1, start[:, None], 0.0)
    states = _walk(code, numbers, bound, list(range(length)), start)
    return bits_of(code, states)


def _walk(code: Filter, numbers: Tensor, metric: Tensor, steps: list[int], end: Tensor | None) -> Tensor:
    """Return the states of the best path from start metrics, int64 (n, steps), to the end state where one is given."""
    table, period = values(code).to(numbers.device), len(code.shifts)
    choices = []
    for t in steps:
        shift = code.shifts[t % period]
        best, choice = metric.unflatten(1, (1 << shift, -1)).min(1)
        choices.append(choice.to(torch.uint8))
        level = table[t % period]
        cost = torch.addcmul(level.square(), numbers[:, t, None], level, value=-2.0)
        metric = (best.unsqueeze(-1) + cost.unflatten(1, (-1, 1 << shift))).flatten(1)
    state = metric.argmin(1) if end is None else end
    states = []
    for t, choice in zip(reversed(steps), reversed(choices), strict=True):
        states.append(state)
        shift = code.shifts[t % period]
        group = state >> shift
        state = group + (choice.gather(1, group[:, None])[:, 0].to(torch.int64) << code.memory - shift)
    return torch.stack(states[::-1], 1)


def bits_of(code: Filter, states: Tensor) -> Tensor:
    """Return the bits that entered at each step of a path, oldest first, uint8 (n, bits)."""
    parts = []
    period, length = len(code.shifts), states.shape[1]
    for t in range(length):
        shift = code.shifts[t % period]
        ages = torch.arange(shift - 1, -1, -1, device=states.device)
        parts.append(states[:, t, None] >> ages & 1)
    return torch.cat(parts, 1).to(torch.uint8)


def _tiny(code: Filter, numbers: Tensor) -> Tensor:
    """Encode segments whose stream is shorter than the window: flip bits while that lowers the error."""
    from tersor.codecs.trellis.filters import segment_matrix

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
