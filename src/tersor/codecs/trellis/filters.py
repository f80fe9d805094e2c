"""Filters of linear trellis codes.

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

from tersor.numerics.constants import constant
from tersor.ops.trellis_linear import Line, reference


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

    def line(self, length: int) -> Line:
        """Return what a line of `length` numbers is."""
        return Line(length, self.shifts, self.memory)

    def bits(self, length: int) -> int:
        """Return the bits of a segment of `length` numbers."""
        return self.line(length).bits(length)

    def taps_tensor(self) -> Tensor:
        """Return the taps, float64 (period, memory)."""
        return torch.tensor(self.taps, dtype=torch.float64)


@cache
def filters() -> Mapping[tuple[float, int], Filter]:
    """Return the packaged filters by rate and memory."""
    text = importlib.resources.files("tersor").joinpath("data/trellis.json").read_text()
    found = [Filter(tuple(one["shifts"]), tuple(map(tuple, one["taps"]))) for one in json.loads(text)["filters"]]
    return MappingProxyType({(one.rate, one.memory): one for one in found})


@constant
def taps_on(code: Filter, device: torch.device) -> Tensor:
    """Return the taps on a device, float32 (period, memory): no copy while a CUDA graph is captured."""
    return code.taps_tensor().to(device=device, dtype=torch.float32)


@cache
def segment_matrix(code: Filter, length: int) -> Tensor:
    """Return the matrix (length, bits) that takes the signs of a segment's circle to its numbers, float32."""
    return reference.matrix(code.taps_tensor(), code.line(length), length).to(torch.float32)
