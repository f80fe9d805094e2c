"""Good tail-biting paths through trellises of too many states for Viterbi's algorithm: beams (the M-algorithm).

A beam keeps the `width` best windows of all that its survivors lead to, step by step. What that means, ties included,
is in `reference`; the compiled walk finds the same paths, but for sums that round differently.
"""

from __future__ import annotations

from torch import Tensor

from tersor.ops.dispatch import compiled_allowed, take_reference
from tersor.ops.trellis_path.beam import reference
from tersor.ops.trellis_path.beam.shapes import refusal
from tersor.ops.trellis_path.beam.sums import Sums


def entering(numbers: Tensor, sums: Sums, width: int) -> Tensor:
    """Return the bits that enter at every step of good tail-biting paths, as numbers: uint8 (n, length).

    Parameters
    ----------
    numbers : Tensor
        float32 (n, length): segments whose stream is at least as long as the window.
    width : int
        Survivors of a step, at most; as many as there are states find the best paths.
    """
    if numbers.is_cuda and not take_reference("trellis_beam", refusal(sums, width)):
        from tersor.ops.trellis_path.beam import launch

        return launch.entering(numbers, sums, width)
    if compiled_allowed("trellis_path"):
        from tersor.ops.trellis_path.beam import compiled

        return compiled.entering(numbers.cpu(), sums, width).to(numbers.device)
    return reference.entering(numbers, sums, width)


__all__ = ["Sums", "entering"]
