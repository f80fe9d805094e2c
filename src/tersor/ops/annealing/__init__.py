"""Annealed sampling of two-basis codes: a fused Triton kernel on CUDA at widths it takes, plain torch elsewhere.

The two draw other random numbers, and the kernel multiplies in half precision: codes differ between devices, errors do
not beyond their spread over seeds (ADR 9). On one kind of device the same seed gives the same codes.
"""

from __future__ import annotations

from torch import Tensor

from tersor.ops.annealing import reference
from tersor.ops.annealing.problem import Bases, Draws, Schedule
from tersor.ops.annealing.shapes import tile_of


def fused(target: Tensor) -> bool:
    """Tell whether `sample` runs the kernel, which also minimizes at the end, on vectors (n, width)."""
    return target.is_cuda and tile_of(target.shape[1]) is not None


def sample(target: Tensor, bases: Bases, schedule: Schedule, draws: Draws) -> Tensor:
    """Return codes uint8 (n, width) of the second basis after `schedule`, for float32 vectors (n, width).

    Those of the first follow by minimization, for the best of them given the second are exact.
    """
    if fused(target):
        from tersor.ops.annealing import launch

        return launch.sample(target, bases, schedule, draws)
    return reference.sample(target, bases, schedule, draws)
