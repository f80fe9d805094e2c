"""The best path of a sequence of numbers through a bit-shift trellis, tails biting: the encoder of trellis codes.

All implementations find the same path, but for ties and for sums that round differently (a fused multiply-add).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.dispatch import compiled_allowed, kernels_allowed, take_reference
from tersor.ops.trellis_path import reference
from tersor.ops.trellis_path.reference import bits_of
from tersor.ops.trellis_path.shapes import Steps, refusal


def best(numbers: Tensor, table: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """Return the bits of the best tail-biting paths, uint8 (n, bits), and what they decode to, float32 (n, length).

    Arguments as of `states`.
    """
    path = states(numbers, table, steps)
    if path.is_cuda and path.dtype == torch.int32 and kernels_allowed():
        from tersor.ops.trellis_path import launch

        return launch.entered(path, table, steps)
    return reference.entered(path, table, steps)


def states(numbers: Tensor, table: Tensor, steps: Steps) -> Tensor:
    """Return the states after every step of the best tail-biting paths, int32 or int64 (n, length).

    Parameters
    ----------
    numbers : Tensor
        float32 (n, length): segments whose stream is at least as long as the window.
    table : Tensor
        The number that every window gives, float32 (period, 2**memory), on the same device.
    """
    if numbers.device.type == "cpu" and compiled_allowed("trellis_path"):
        from tersor.ops.trellis_path import compiled

        return compiled.states(numbers, table, steps)
    if numbers.is_cuda and not take_reference("trellis_path", refusal(steps, numbers.shape[1])):
        from tersor.ops.trellis_path import launch

        return launch.states(numbers, table[None], steps)
    return reference.states(numbers, table, steps)


__all__ = ["Steps", "best", "bits_of", "states"]
