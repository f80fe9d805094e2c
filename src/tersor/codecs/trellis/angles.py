"""Folded trellis codes: a window's number is a point of a circle, bent to the normal's shape; all in whole numbers.

Every bit of the window turns a hand by its own angle, a whole number of 2**-16 turns, so angles add modulo 2**16. A
curve, nearly the inverse of the normal's distribution, takes the angle to the number. Bits that enter or leave at one
step turn by powers of two, so that the numbers they choose among are spread evenly (Ungerboeck, IEEE Trans. Inf. Theory
28, 1982, section III); the others are searched for. The bit-shift trellis and computed numbers are QTIP's (Tseng et
al., arXiv 2406.11235), whose numbers are hashes of the window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import shelf
from tersor.codecs.trellis.windows import Window, editions_of, every_window, newest
from tersor.ops.trellis_path import Steps
from tersor.ops.trellis_path.beam import Sums

FOLD = 16  # bits of an angle
SLOPE = 13  # bits after the point of the curve's coefficients
KEPT = 21  # bits after the point of a number
POWERS = (0, 1, 4, 16, 64)  # of the angle's square: steep ends take high ones
CURVE = (10249, 3196, 4891, 2466, 6701)  # least squares on the inverse of the normal's distribution


@dataclasses.dataclass(frozen=True)
class Folded(Window):
    """A folded trellis code for the unit normal.

    Attributes
    ----------
    turns : tuple of tuple of int
        Angles of the bits, in 2**-16 turns, (period, memory): the newest bit's first.
    curve : tuple of int
        The coefficients of the curve, in 2**-13; their sum is below 2**15.
    """

    turns: tuple[tuple[int, ...], ...]
    curve: tuple[int, ...] = CURVE

    @property
    def weights(self) -> tuple[tuple[int, ...], ...]:
        """The turns."""
        return self.turns

    def table(self) -> Tensor:
        """See `Window.table`."""
        return bent(self.curve)[torch.tensor(self.turns) @ every_window(self.memory) & (1 << FOLD) - 1]

    def sums(self) -> Sums:
        """See `Window.sums`."""
        return Sums(Steps(self.memory, self.shifts), torch.tensor(self.turns), bent(self.curve))

    def angles(self, signs: Tensor, size: int) -> Tensor:
        """Return a segment's angles, int32 (n, size), from the signs of its stream."""
        return self.summed((signs > 0).to(torch.int32), size) & (1 << FOLD) - 1

    def numbers(self, signs: Tensor, size: int) -> Tensor:
        """See `Window.numbers`."""
        return bent(self.curve).to(signs.device)[self.angles(signs, size)]

    def numbers_at(self, signs: Tensor, places: Tensor, phases: Tensor) -> Tensor:
        """See `Window.numbers_at`."""
        angles = self.summed_at((signs > 0).to(torch.int32), places, phases) & (1 << FOLD) - 1
        return bent(self.curve).to(signs.device)[angles]


def terms(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return angles from -1 to 1, int64, and the powers of their squares that coefficients weigh, (5, *angles.shape).

    Both are in 2**-16; powers are cut to that one after another, so that 32 bits hold all products.
    """
    centred = 2 * angles.to(torch.int64) + 1 - (1 << FOLD)
    found, square = [torch.full_like(centred, 1 << FOLD)], centred * centred >> FOLD
    for power in range(max(POWERS).bit_length()):
        if 1 << power in POWERS:
            found.append(square)
        square = square * square >> FOLD
    return centred, torch.stack(found)


@cache
def bent(curve: tuple[int, ...]) -> Tensor:
    """Return the number of every angle, float32 (2**16,): exact, in steps of 2**-21."""
    centred, weighed = terms(torch.arange(1 << FOLD))
    slope = torch.tensordot(torch.tensor(curve), weighed, 1) >> FOLD
    return (centred * slope >> FOLD + SLOPE - KEPT).to(torch.float32) * 2.0**-KEPT


@cache
def folded_editions() -> Mapping[tuple[float, int, int], Folded]:
    """Return all packaged folded codes by rate, memory and edition."""
    return editions_of(Folded(tuple(one["shifts"]), tuple(map(tuple, one["turns"])), tuple(one["curve"]))
                       for one in shelf()["folded"])


@cache
def folded() -> Mapping[tuple[float, int], Folded]:
    """Return the packaged folded codes of the last editions by rate and memory."""
    return newest(folded_editions())
