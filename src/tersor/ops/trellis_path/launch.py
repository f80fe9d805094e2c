"""The best path on CUDA: launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.trellis_path.kernels.back import back
from tersor.ops.trellis_path.kernels.entered import entered as write_entered
from tersor.ops.trellis_path.kernels.long import forward
from tersor.ops.trellis_path.kernels.path import path
from tersor.ops.trellis_path.shapes import (
    FOLLOWED,
    LONG_MEMORY,
    MOST_WARPS,
    WORD,
    Steps,
    long_parts,
    parts,
    together,
    warps,
)

CHOICES = 1 << 32  # bytes of choices held at a time
LONG_CHOICES = 1 << 30  # the same of long windows: of some 1,000 segments
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
    if steps.memory == LONG_MEMORY:
        return _long_states(numbers.contiguous(), table.contiguous(), steps)
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


def _long_states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return `states` of windows whose groups are kept in shared memory: walks, and what follows them back, in turns.

    So that no multiprocessor waits while one path is followed.
    """
    count, length = numbers.shape
    warm, split = steps.warm(length), long_parts(steps)
    room = max(length, 2 * warm) << split[2]
    most = min(count, max(1, LONG_CHOICES // (WORD * room)))
    out = torch.empty(count, length, dtype=torch.int32, device=numbers.device)
    choices = torch.empty(most * room, dtype=torch.int32, device=numbers.device)
    seams = torch.empty(most, dtype=torch.int32, device=numbers.device)
    with torch.cuda.device(numbers.device):
        for begin in range(0, count, most):
            programs = min(most, count - begin)
            for first, steps_made, until, bound in ((length - warm, 2 * warm, warm - 1, False), (0, length, 0, True)):
                forward[(programs,)](numbers, table, choices, seams, begin, count // len(table), length, first,
                                     steps_made, room, int(bound), steps.memory, steps.shifts, split,
                                     not steps.linear, together(steps), num_warps=1 << MOST_WARPS)
                back[(-(-programs // FOLLOWED),)](choices, seams, out, begin, programs, length, steps_made, until, room,
                                                  steps.memory, steps.shifts, 1 << split[2], 1 << split[3], bound,
                                                  FOLLOWED, num_warps=1)
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
