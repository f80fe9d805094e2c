"""Numbers of windows that are sums over their bits, as tables of pieces of the window."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.ops.trellis_path.shapes import Steps

PIECE = 8  # bits of a window that one look finds the sum of
# splitmix64 (Steele, Lea and Flood 2014): its step, and its multipliers and shifts, as int64 holds them
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
MIXED = ((0xBF58476D1CE4E5B9 - (1 << 64), 30), (0x94D049BB133111EB - (1 << 64), 27))


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """The numbers of windows of up to 64 bits.

    Attributes
    ----------
    steps : Steps
    weights : Tensor
        Of the bits, newest first, (period, memory): float64, added as the signs of the bits; or int64 angles, added
        where a bit is set.
    curve : Tensor or None
        The number of every angle, float32 (2**16,); None where sums are the numbers.
    """

    steps: Steps
    weights: Tensor
    curve: Tensor | None = None

    def pieces(self) -> tuple[Tensor, Tensor]:
        """Return what pieces of a window add, float32 (period, pieces, 2**8), and what new bits do, (period, 2**most).

        The latter to a window in which they are not set. Angles are whole, and exact in float32: 64 are below 2**22.
        """
        period, memory = self.weights.shape
        count = -(-memory // PIECE)
        padded = torch.zeros(period, count * PIECE, dtype=torch.float64)
        padded[:, :memory] = self.weights
        bits = (torch.arange(1 << PIECE)[:, None] >> torch.arange(PIECE) & 1).to(torch.float64)
        scaled = bits if self.curve is not None else 2 * bits - 1
        tables = torch.einsum("pcj,wj->pcw", padded.unflatten(1, (count, PIECE)), scaled)
        new = tables[:, 0, : 1 << max(self.steps.shifts)]
        return tables.to(torch.float32), (new - new[:, :1]).to(torch.float32)

    def order(self) -> Tensor:
        """Return all new bits in the order of candidates, int32 (period, 2**most); -1 where a phase takes fewer."""
        found = torch.full((len(self.steps.shifts), 1 << max(self.steps.shifts)), -1, dtype=torch.int32)
        for own, shift in zip(found, self.steps.shifts, strict=True):
            own[: 1 << shift] = backwards(torch.arange(1 << shift), shift)
        return found

    def starts(self, width: int) -> Tensor:
        """Return the windows that a walk without a start begins with, int64: all, or `width` that are spread at random.

        Drawn by splitmix64 from their numbers, so they are the same everywhere; each once. In the order of their bits,
        newest first, which walks keep: windows that agree in their newest bits are neighbours.
        """
        memory = self.steps.memory
        if memory < 31 and 1 << memory <= width:
            return backwards(torch.arange(1 << memory), memory)
        mixed = torch.arange(1, width + 1) * STEP
        for multiplier, shift in MIXED:
            mixed = (mixed ^ (mixed >> shift & mask(64 - shift))) * multiplier
        return backwards(backwards((mixed ^ (mixed >> 31 & mask(33))) & mask(memory), memory).unique(), memory)


def backwards(windows: Tensor, bits: int) -> Tensor:
    """Return numbers of so many bits, int64, with their bits in the opposite order."""
    found = torch.zeros_like(windows)
    for place in range(bits):
        found |= (windows >> place & 1) << bits - 1 - place
    return found


def mask(bits: int) -> int:
    """Return a number of which so many low bits are set, as int64 holds it."""
    return -1 if bits >= 64 else (1 << bits) - 1
