"""The best path on the processor: arrays for the compiled walks, and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from tersor.numerics.settings import threads_allowed
from tersor.ops.trellis_path.kernels.walk import walk
from tersor.ops.trellis_path.shapes import Steps

LEAST_WORK = 1 << 22  # states of all steps that are worth a thread: a millisecond or two


def states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return the states after every step of the best tail-biting paths, int64 (n, length), for float32 (n, length).

    Every segment is walked by itself, so the paths do not depend on the number of threads.
    """
    count, length = numbers.shape
    out = torch.empty(count, length, dtype=torch.int64, device="cpu")
    shares = max(1, min(threads_allowed(), count, (count * length << steps.memory) // LEAST_WORK))
    parts = zip(numbers.contiguous().tensor_split(shares), out.tensor_split(shares), strict=True)
    first, *others = [(*part, table.contiguous(), steps) for part in parts]
    with ThreadPoolExecutor(max(1, len(others))) as pool:  # starts no thread before there is work
        begun = [pool.submit(_walk, *other) for other in others]
        _walk(*first)
        for one in begun:
            one.result()
    return out


def _walk(numbers: Tensor, out: Tensor, table: Tensor, steps: Steps) -> None:
    """Write the states of some segments."""
    length = numbers.shape[1]
    warm = steps.warm(length)
    bests = np.empty((max(length, 2 * warm) + 1) * steps.groups, np.float32)
    problem = (table.numpy().reshape(-1), np.array(steps.shifts, np.int64), steps.memory)
    walk(numbers.numpy(), problem, warm, bests, out.numpy())
