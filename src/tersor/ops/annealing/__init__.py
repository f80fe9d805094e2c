"""Annealed sampling of two-basis codes: a fused Triton kernel on CUDA at widths it takes, plain torch elsewhere.

The two draw other random numbers, and the kernel multiplies in half precision: codes differ between devices, errors do
not beyond their spread over seeds (ADR 9). On one kind of device the same seed gives the same codes.
"""

from __future__ import annotations

from torch import Tensor

from tersor.ops.annealing import reference
from tersor.ops.annealing.problem import Bases, Schedule

KERNEL_WIDTHS = (256, 512, 1024, 2048, 4096, 8192)


def sample(target: Tensor, bases: Bases, schedule: Schedule, seed: int) -> tuple[Tensor, Tensor]:
    """Return codes (n, width) of both bases after `schedule`, uint8, for float32 vectors (n, width)."""
    if target.is_cuda and target.shape[1] in KERNEL_WIDTHS:
        from tersor.ops.annealing import triton

        return triton.sample(target, bases, schedule, seed)
    return reference.sample(target, bases, schedule, seed)
