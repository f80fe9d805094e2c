"""Linear trellis codes: a window's number is the sum of its bits, as signs, weighed by the taps of a filter.

So a line of numbers is a small matrix times the signs of its stream; see docs/codecs/trellis.md.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tersor.codecs.trellis.windows import Window, editions_of, every_window, newest
from tersor.numerics.constants import constant
from tersor.ops.trellis_linear import reference
from tersor.ops.trellis_linear.shapes import segments
from tersor.ops.trellis_path import Steps
from tersor.ops.trellis_path.beam import Sums


@dataclasses.dataclass(frozen=True)
class Filter(Window):
    """A linear trellis code for the unit normal.

    Attributes
    ----------
    taps : tuple of tuple of float
        (period, memory): the newest bit's first.
    """

    taps: tuple[tuple[float, ...], ...]

    @property
    def weights(self) -> tuple[tuple[float, ...], ...]:
        """The taps."""
        return self.taps

    def taps_tensor(self) -> Tensor:
        """Return the taps, float64 (period, memory)."""
        return torch.tensor(self.taps, dtype=torch.float64)

    def circle(self, length: int) -> Tensor | None:
        """Return the taps as `Coded` has them, float32 (period, reach, bits of a number).

        None where numbers have not all as many bits, or a line of `length` numbers is not one circle of whole periods.
        """
        bits = self.shifts[0]
        if len(set(self.shifts)) > 1 or len(segments(length)) != 1 or length % len(self.shifts):
            return None
        every = functional.pad(self.taps_tensor(), (0, -self.memory % bits))
        return every.unflatten(1, (-1, bits)).flip(2).to(torch.float32)

    def table(self) -> Tensor:
        """See `Window.table`."""
        signs = (every_window(self.memory) * 2 - 1).to(torch.float64)
        return (self.taps_tensor() @ signs).to(torch.float32)

    def sums(self) -> Sums:
        """See `Window.sums`."""
        return Sums(Steps(self.memory, self.shifts), self.taps_tensor())

    def numbers(self, signs: Tensor, size: int) -> Tensor:
        """See `Window.numbers`."""
        return self.summed(signs, size)

    def numbers_at(self, signs: Tensor, places: Tensor, phases: Tensor) -> Tensor:
        """See `Window.numbers_at`."""
        return self.summed_at(signs, places, phases)


@cache
def shelf() -> Mapping[str, Any]:
    """Return the packaged codes, as their file holds them: only ever added to, since stores refer to them by number."""
    text = importlib.resources.files("tersor").joinpath("data/trellis.json").read_text()
    return MappingProxyType(json.loads(text))


@cache
def filter_editions() -> Mapping[tuple[float, int, int], Filter]:
    """Return all packaged linear codes by rate, memory and edition."""
    return editions_of(Filter(tuple(one["shifts"]), tuple(map(tuple, one["taps"]))) for one in shelf()["filters"])


@cache
def filters() -> Mapping[tuple[float, int], Filter]:
    """Return the packaged linear codes of the last editions by rate and memory."""
    return newest(filter_editions())


@constant
def taps_on(bits: float, memory: int, edition: int, device: torch.device) -> Tensor:
    """Return the taps of a packaged code on a device, float32 (period, memory)."""
    return filter_editions()[bits, memory, edition].taps_tensor().to(device=device, dtype=torch.float32)


@cache
def segment_matrix(code: Filter, length: int) -> Tensor:
    """Return the matrix (length, bits) that takes the signs of a segment's circle to its numbers, float32."""
    return reference.matrix(code.taps_tensor(), code.line(length), length).to(torch.float32)
