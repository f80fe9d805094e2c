"""The best path of a sequence of numbers through a bit-shift trellis, tails biting: the encoder of trellis codes.

All implementations find the same path, but for ties and for sums that round differently (a fused multiply-add).
"""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor

from tersor.ops.dispatch import kernels_allowed, log_once, take_reference
from tersor.ops.trellis_path import reference
from tersor.ops.trellis_path.shapes import Steps, refusal


def states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return the states after every step of the best tail-biting paths, int32 or int64 (n, length).

    Parameters
    ----------
    numbers : Tensor
        float32 (n, length): segments whose stream is at least as long as the window.
    table : Tensor
        The number that every window gives, float32 (period, 2**memory), on the same device.
    """
    if numbers.device.type == "cpu" and kernels_allowed() and has_numba():
        from tersor.ops.trellis_path import compiled

        return compiled.states(numbers, table, steps)
    if numbers.is_cuda and not take_reference("trellis_path", refusal(steps, numbers.shape[1])):
        from tersor.ops.trellis_path import launch

        return launch.states(numbers, table[None], steps)
    return reference.states(numbers, table, steps)


@cache
def has_numba() -> bool:
    """Tell whether numba is installed; what it would bring is logged once where it is not."""
    found = importlib.util.find_spec("numba") is not None
    if not found:
        log_once("trellis_path", "numba is not installed, with which it is some ten times as fast; install tersor[cpu]")
    return found


__all__ = ["Steps", "has_numba", "states"]
