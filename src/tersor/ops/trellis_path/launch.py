"""The best path on CUDA: which segments the kernel takes, and its launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.trellis_path.kernels.path import path

MOST_MEMORY = 15  # metrics of 2**15 states fill half of a multiprocessor's registers
MOST_PERIOD = 4
CHOICES = 1 << 32  # bytes of choices held at a time


def takes(memory: int, shifts: tuple[int, ...], length: int, warm: int) -> bool:
    """Tell whether the kernel takes segments of this length."""
    period = len(shifts)
    return memory <= MOST_MEMORY and period <= MOST_PERIOD and not (length % period or warm % period or not warm)


def states(numbers: Tensor, table: Tensor, memory: int, shifts: tuple[int, ...], warm: int) -> Tensor:
    """Return the states after every step of the best tail-biting paths, int32 (n, length).

    Parameters
    ----------
    numbers : Tensor
        float32 (n, length) on CUDA.
    table : Tensor
        The number of every window, float32 (tables, period, 2**memory); equal runs of segments share one.
    warm : int
        Steps on either side of the seam.
    """
    count, length = numbers.shape
    stride = (1 << memory) >> min(shifts)
    most = max(1, CHOICES // ((length + 2 * warm) * stride))
    out = torch.empty(count, length, dtype=torch.int32, device=numbers.device)
    choices = torch.empty(min(most, count) * (length + 2 * warm) * stride, dtype=torch.uint8, device=numbers.device)
    padded = [*shifts, *[shifts[0]] * (MOST_PERIOD - len(shifts))]
    warps = max(1, min(16, (1 << memory) // 512))
    with torch.cuda.device(numbers.device):
        for first in range(0, count, most):
            path[(min(most, count - first),)](numbers, table, choices, out, first, count // len(table), length, memory,
                                              warm, stride, len(shifts), *padded, num_warps=warps)
    return out
