"""The best path on CUDA: launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.trellis_path.kernels.path import path
from tersor.ops.trellis_path.shapes import MOST_PERIOD, Steps

CHOICES = 1 << 32  # bytes of choices held at a time
STATES_A_WARP = 512


def states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return the states after every step of the best tail-biting paths, int64 (n, length).

    Parameters
    ----------
    numbers : Tensor
        float32 (n, length) on CUDA.
    table : Tensor
        float32 (tables, period, 2**memory); equal runs of segments share one.
    """
    count, length = numbers.shape
    warm = steps.warm(length)
    nbytes = (length + 2 * warm) * steps.groups
    most = max(1, CHOICES // nbytes)
    out = torch.empty(count, length, dtype=torch.int32, device=numbers.device)
    choices = torch.empty(min(most, count) * nbytes, dtype=torch.uint8, device=numbers.device)
    shifts = (steps.shifts * MOST_PERIOD)[:MOST_PERIOD]
    warps = max(1, min(16, (1 << steps.memory) // STATES_A_WARP))
    with torch.cuda.device(numbers.device):
        for first in range(0, count, most):
            path[(min(most, count - first),)](numbers.contiguous(), table.contiguous(), choices, out, first,
                                              count // len(table), length, steps.memory, warm, steps.groups,
                                              len(steps.shifts), *shifts, num_warps=warps)
    return out.to(torch.int64)
