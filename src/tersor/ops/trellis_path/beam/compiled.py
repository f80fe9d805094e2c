"""Beams on the processor: arrays for the compiled walk."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tersor.ops.trellis_path.beam.sums import Sums
from tersor.ops.trellis_path.kernels.survivors import bitten, scratch
from tersor.ops.workers import share


def entering(numbers: Tensor, sums: Sums, width: int) -> Tensor:
    """Return the bits that enter at every step, uint8 (n, length), for float32 numbers (n, length) on the processor."""
    count, length = numbers.shape
    tables, news = (one.numpy() for one in sums.pieces())
    curve = np.zeros(0, np.float32) if sums.curve is None else sums.curve.cpu().numpy()
    shifts = np.array(sums.steps.shifts, dtype=np.int64)
    starts = sums.starts(width).numpy().view(np.uint64)
    warm, rows = sums.steps.warm(length), numbers.contiguous().numpy()
    out = np.empty((count, length), np.uint8)

    def walk(span: tuple[int, int]) -> None:
        mine = slice(*span)
        work = scratch(max(width, len(starts)), 1 << int(shifts.max()), max(length, 2 * warm))
        bitten(rows[mine], (tables, news, curve, shifts, sums.steps.memory), (starts, width, warm), work, out[mine])

    share(count, count * length * width, walk)
    return torch.from_numpy(out)
