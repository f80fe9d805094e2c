"""The best tail-biting path through a bit-shift trellis in plain torch: what the kernels mean.

A step drops the `k` oldest bits of the window and takes `k` new ones, so states fall into groups that share what is
kept: a group has 2**k states before, and 2**k after. A first walk over the seam finds the state at it, which the second
walk starts and ends with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.numerics.constants import constant
from tersor.ops.trellis_path.shapes import Steps

STATES_AT_ONCE = 1 << 27  # metrics and choices held at a time


def states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return the states after every step, int64 (n, length), for float32 numbers (n, length)."""
    length = numbers.shape[1]
    count = max(1, STATES_AT_ONCE // max(1 << steps.memory, steps.groups * length // 4))
    return torch.cat([_bitten(part, table, steps) for part in numbers.split(count)])


def entered(path: Tensor, table: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """Return the bits that entered, oldest first, uint8 (n, bits), and the numbers of windows, float32 (n, length)."""
    phases = torch.arange(path.shape[1], device=path.device) % len(table)
    return bits_of(path, steps.shifts), table[phases, path.to(torch.int64)]


def bits_of(path: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Return the bits that entered at each step of a path, oldest first, uint8 (n, bits)."""
    step, age = _entering(shifts, path.shape[1], path.device)
    return (path[:, step] >> age).bitwise_and_(1).to(torch.uint8)


@constant
def _entering(shifts: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """Return at which step every bit of a stream entered, and how old it was after it, int32 (2, bits)."""
    counts = torch.tensor(shifts).repeat(-(-length // len(shifts)))[:length]
    step = torch.arange(length).repeat_interleave(counts)
    age = counts.cumsum(0)[step] - 1 - torch.arange(int(counts.sum()))
    return torch.stack([step, age]).to(torch.int32).to(device)


def _bitten(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    length = numbers.shape[1]
    warm = steps.warm(length)
    free = torch.zeros(len(numbers), 1 << steps.memory, dtype=torch.float32, device=numbers.device)
    around = [place % length for place in range(-warm, warm)]
    start = walk(numbers, table, steps, free, around, None)[:, warm - 1]
    bound = torch.full_like(free, torch.inf).scatter_(1, start[:, None], 0.0)
    return walk(numbers, table, steps, bound, range(length), start)


def walk(numbers: Tensor, table: Tensor, steps: Steps, metric: Tensor, places: Sequence[int],
         end: Tensor | None) -> Tensor:
    """Return the states of the best path over some places, int64 (n, places).

    Parameters
    ----------
    metric : Tensor
        What it costs to start in a state, (n, 2**memory).
    end : Tensor or None
        The state to end in, int64 (n,); None: the best.
    """
    period = len(steps.shifts)
    choices = []
    for t in places:
        shift, level = steps.shifts[t % period], table[t % period]
        best, choice = metric.unflatten(1, (1 << shift, -1)).min(1)
        choices.append(choice.to(torch.uint8))
        cost = (numbers[:, t, None] - level).square_()
        metric = (best.unsqueeze(-1) + cost.unflatten(1, (-1, 1 << shift))).flatten(1)
    state = metric.argmin(1) if end is None else end
    found = []
    for t, choice in zip(reversed(places), reversed(choices), strict=True):
        found.append(state)
        shift = steps.shifts[t % period]
        group = state >> shift
        state = group + (choice.gather(1, group[:, None])[:, 0].to(torch.int64) << steps.memory - shift)
    return torch.stack(found[::-1], 1)
