"""The best path on CUDA: launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.trellis_path.kernels.entered import entered as write_entered
from tersor.ops.trellis_path.kernels.path import path
from tersor.ops.trellis_path.shapes import Steps, parts, warps

CHOICES = 1 << 32  # bytes of choices held at a time
WORD = 4
BLOCK = 256  # steps of a program that writes bits


def states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return the states after every step of the best tail-biting paths, int32 (n, length).

    Parameters
    ----------
    numbers : Tensor
        float32 (n, length) on CUDA.
    table : Tensor
        float32 (tables, period, 2**memory); equal runs of segments share one.
    """
    count, length = numbers.shape
    warm, split = steps.warm(length), parts(steps)
    room = max(length, 2 * warm) << split[1]
    most = max(1, CHOICES // (WORD * room))
    out = torch.empty(count, length, dtype=torch.int32, device=numbers.device)
    choices = torch.empty(min(most, count) * room, dtype=torch.int32, device=numbers.device)
    table = table.contiguous()
    with torch.cuda.device(numbers.device):
        for first in range(0, count, most):
            path[(min(most, count - first),)](numbers.contiguous(), table, choices, out, first,
                                              count // len(table), length, warm, room, steps.memory, steps.shifts,
                                              split, not steps.linear, num_warps=warps(steps))
    return out


def entered(path: Tensor, table: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """Return the bits that entered, uint8 (n, bits), and the windows' numbers, float32 (n, length), of int32 states."""
    (count, length), shifts = path.shape, steps.shifts
    whole, rest = divmod(length, len(shifts))
    stream = whole * sum(shifts) + sum(shifts[:rest])
    bits = torch.empty(count, stream, dtype=torch.uint8, device=path.device)
    numbers = torch.empty(count, length, dtype=torch.float32, device=path.device)
    if path.numel():
        with torch.cuda.device(path.device):
            write_entered[(count, -(-length // BLOCK))](path, table, bits, numbers, length, stream, 1 << steps.memory,
                                                        shifts, sum(shifts), max(shifts), BLOCK)
    return bits, numbers
