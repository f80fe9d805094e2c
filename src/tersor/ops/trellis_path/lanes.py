"""The best path on the processor: segments in lanes, arrays for the compiled walks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tersor.ops.trellis_path.kernels.walk import FEW, LANES, levels, walk
from tersor.ops.trellis_path.shapes import Steps


def states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return the states after every step of the best tail-biting paths, int64 (n, length), for float32 (n, length)."""
    count, length = numbers.shape
    lanes = FEW if count <= 2 * FEW else LANES
    shifts = np.array(steps.shifts, dtype=np.int64)
    read = levels(table.numpy(), shifts, lanes)
    warm, work = steps.warm(length), _Work(steps, length, lanes)
    out = torch.empty(count, length, dtype=torch.int64)
    found = np.empty((length + 2 * warm, lanes), np.int64)
    for first in range(0, count, lanes):
        part = numbers[first : first + lanes]
        x = np.zeros((length, lanes), np.float32)
        x[:, : len(part)] = part.numpy().T
        free = np.full(lanes, -1, np.int64)
        problem = (x, read, shifts, steps.memory)
        walk(problem, free, (length - warm, 2 * warm or length), work.arrays, found)
        start = found[(warm or length) - 1].copy()
        walk(problem, start, (0, length), work.arrays, found)
        out[first : first + len(part)] = torch.from_numpy(found[:length, : len(part)].T.copy())
    return out


class _Work:
    """Arrays that walks write: metrics before and after a step, and every group's choice at every step."""

    def __init__(self, steps: Steps, length: int, lanes: int) -> None:
        metrics = (1 << steps.memory) * lanes
        self.arrays = (np.empty(metrics, np.float32), np.empty(metrics, np.float32),
                       np.empty((max(length, 2 * steps.warm(length)), steps.groups * lanes), np.uint8))
