"""Which beams the kernels for CUDA take."""

from __future__ import annotations

from tersor.ops.trellis_path.beam.sums import Sums

LEAST_BLOCK = 32
MOST_CANDIDATES = 1 << 14  # of a step: counts of them are held in 16 bits


def refusal(sums: Sums, width: int) -> str | None:
    """Return why the kernels do not take a beam, or None."""
    found = block_of(width) << max(sums.steps.shifts)
    return None if found <= MOST_CANDIDATES else f"{found} candidates a step are more than {MOST_CANDIDATES}"


def block_of(width: int) -> int:
    """Return the survivors that a program has room for."""
    return max(LEAST_BLOCK, 1 << (width - 1).bit_length())
