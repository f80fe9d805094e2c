"""What all trellis codes share: bits that enter a window step by step, in segments whose streams are circles.

At step t of a segment, `shifts[t mod p]` new bits enter a window of `memory` bits, and the window's number is that of
step t. Which number a window has is what kinds of codes differ in.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from tersor.ops.trellis_linear import Line, reference
from tersor.ops.trellis_path.beam import Sums


@dataclasses.dataclass(frozen=True)
class Window(abc.ABC):
    """A trellis code for the unit normal, with one weight a bit of the window and phase.

    Attributes
    ----------
    shifts : tuple of int
        New bits a step, by phase.
    """

    shifts: tuple[int, ...]

    @property
    @abc.abstractmethod
    def weights(self) -> tuple[tuple[float, ...], ...]:
        """(period, memory): the newest bit's first."""

    @abc.abstractmethod
    def table(self) -> Tensor:
        """Return the number that every window gives, float32 (period, 2**memory)."""

    @abc.abstractmethod
    def sums(self) -> Sums:
        """Return what beams know of the numbers of windows, whose table would be too long."""

    @abc.abstractmethod
    def numbers(self, signs: Tensor, size: int) -> Tensor:
        """Return a segment's numbers, float32 (n, size), from the signs of its stream, float32 (n, bits).

        Summed bit by bit, so that a row's numbers do not depend on the rows beside it.
        """

    @abc.abstractmethod
    def numbers_at(self, signs: Tensor, places: Tensor, phases: Tensor) -> Tensor:
        """Return numbers (k, n) of phases (k,), whose windows are rows `places` (k, memory) of signs (bits, n)."""

    @property
    def memory(self) -> int:
        """Bits of the window."""
        return len(self.weights[0])

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

    def stream(self, length: int) -> int:
        """Return the bits of a line of `length` numbers, all segments."""
        return self.line(length).stream

    def summed(self, circle: Tensor, size: int) -> Tensor:
        """Return the sums of weights times a stream's entries, (n, size) for (n, bits), in the dtype of the entries."""
        return reference.summed(circle, self.weights, self.line(size), size)

    def summed_at(self, entries: Tensor, places: Tensor, phases: Tensor) -> Tensor:
        """Return the same sums of some windows, (k, n) for entries (bits, n); see `numbers_at`."""
        weights = torch.tensor(self.weights, dtype=entries.dtype, device=entries.device)[phases]
        out = entries.new_zeros(len(places), entries.shape[1])
        for age in range(self.memory):
            out.add_(entries[places[:, age]].mul_(weights[:, age, None]))
        return out


Kind = TypeVar("Kind", bound=Window)


def editions_of(codes: Iterable[Kind]) -> Mapping[tuple[float, int, int], Kind]:
    """Return packaged codes by rate, memory and edition: its place, from 1 on, among those of this rate and memory."""
    found: dict[tuple[float, int, int], Kind] = {}
    for code in codes:
        edition = 1
        while (code.rate, code.memory, edition) in found:
            edition += 1
        found[code.rate, code.memory, edition] = code
    return MappingProxyType(found)


def newest(editions: Mapping[tuple[float, int, int], Kind]) -> Mapping[tuple[float, int], Kind]:
    """Return the codes of the last editions, by rate and memory."""
    return MappingProxyType({(rate, memory): editions[rate, memory, last] for rate, memory, last in sorted(editions)})


def every_window(memory: int) -> Tensor:
    """Return the bits of all windows, int64 (memory, 2**memory): the newest, which is the lowest of a state, first."""
    return torch.arange(1 << memory)[None] >> torch.arange(memory)[:, None] & 1
