"""Filters of linear trellis codes, and what a line of numbers is to them: segments, streams, and one small matrix.

At step t of a segment, `shifts[t mod p]` new bits enter a window, and the number is the sum of the last `memory` bits,
as signs, weighed by the taps of phase `t mod p`. Segments bite their tails: the stream is a circle.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

SEGMENT = 256  # numbers, about
UNIT = 4  # periods divide it, so all segments but the last of a line hold whole periods


@dataclasses.dataclass(frozen=True)
class Filter:
    """A linear trellis code for the unit normal.

    Attributes
    ----------
    shifts : tuple of int
        New bits a step, by phase.
    taps : tuple of tuple of float
        (period, memory): the newest bit's first.
    """

    shifts: tuple[int, ...]
    taps: tuple[tuple[float, ...], ...]

    @property
    def memory(self) -> int:
        """Bits of the window."""
        return len(self.taps[0])

    @property
    def rate(self) -> float:
        """Bits a number."""
        return sum(self.shifts) / len(self.shifts)

    def bits(self, length: int) -> int:
        """Return the bits of a segment of `length` numbers."""
        whole, rest = divmod(length, len(self.shifts))
        return whole * sum(self.shifts) + sum(self.shifts[:rest])

    def stream(self, length: int) -> int:
        """Return the bits of a line of `length` numbers, all segments."""
        return sum(self.bits(size) for size in segments(length))

    def taps_tensor(self) -> Tensor:
        """Return the taps, float64 (period, memory)."""
        return torch.tensor(self.taps, dtype=torch.float64)


@cache
def filters() -> Mapping[tuple[float, int], Filter]:
    """Return the packaged filters by rate and memory."""
    text = importlib.resources.files("tersor").joinpath("data/trellis.json").read_text()
    found = [Filter(tuple(one["shifts"]), tuple(map(tuple, one["taps"]))) for one in json.loads(text)["filters"]]
    return MappingProxyType({(one.rate, one.memory): one for one in found})


def segments(length: int) -> tuple[int, ...]:
    """Return the sizes of a line's segments, as even as whole units allow; the last takes the rest."""
    units = length // UNIT
    count = max(1, round(length / SEGMENT))
    sizes = [UNIT * ((i + 1) * units // count - i * units // count) for i in range(count)]
    sizes[-1] += length % UNIT
    return tuple(size for size in sizes if size)


def windows(shifts: tuple[int, ...], memory: int, length: int) -> tuple[Tensor, Tensor, int]:
    """Return which bits of a segment's stream each number sees, (length, memory), its phase (length,), and all bits."""
    phases = torch.arange(length) % len(shifts)
    entering = torch.tensor(shifts)[phases]
    total = int(entering.sum())
    newest = entering.cumsum(0) - 1
    return (newest[:, None] - torch.arange(memory)) % total, phases, total


def linear(taps: Tensor, shifts: tuple[int, ...], length: int) -> Tensor:
    """Return the matrix (length, bits) that takes the signs of a segment's stream to its numbers, float64."""
    places, phases, total = windows(shifts, taps.shape[1], length)
    matrix = torch.zeros(length, total, dtype=torch.float64)
    return matrix.scatter_add_(1, places, taps.to(torch.float64)[phases])


@cache
def segment_matrix(code: Filter, length: int) -> Tensor:
    """Return `linear` of a packaged filter, float32."""
    return linear(code.taps_tensor(), code.shifts, length).to(torch.float32)
