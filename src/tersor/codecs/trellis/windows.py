"""What all trellis codes share: bits that enter a window step by step, in segments whose streams are circles.

At step t of a segment, `shifts[t mod p]` new bits enter a window of `memory` bits, and the window's number is that of
step t. Which number a window has is what kinds of codes differ in.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from tersor.ops.trellis_path.beam import Sums

SEGMENT = 256  # numbers, about
UNIT = 4  # periods divide it, so all segments but the last of a line hold whole periods


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

    def bits(self, length: int) -> int:
        """Return the bits of a segment of `length` numbers."""
        whole, rest = divmod(length, len(self.shifts))
        return whole * sum(self.shifts) + sum(self.shifts[:rest])

    def stream(self, length: int) -> int:
        """Return the bits of a line of `length` numbers, all segments."""
        return sum(self.bits(size) for size in segments(length))

    def summed(self, circle: Tensor, size: int) -> Tensor:
        """Return the sums of weights times a stream's entries, (n, size) for (n, bits), in the dtype of the entries."""
        period, total, each = len(self.shifts), circle.shape[1], sum(self.shifts)
        turns = -(-self.memory // total) if total else 0  # of the circle that the first window reaches back
        unrolled = torch.cat([circle] * (turns + 1), 1)
        out = circle.new_zeros(len(circle), size)
        for phase in range(min(period, size)):
            newest = turns * total + sum(self.shifts[: phase + 1]) - 1
            last = (-(-(size - phase) // period) - 1) * each + 1
            for age, weight in enumerate(self.weights[phase]):
                out[:, phase::period].add_(unrolled[:, newest - age : newest - age + last : each], alpha=weight)
        return out

    def summed_at(self, entries: Tensor, places: Tensor, phases: Tensor) -> Tensor:
        """Return the same sums of some windows, (k, n) for entries (bits, n); see `numbers_at`."""
        weights = torch.tensor(self.weights, dtype=entries.dtype, device=entries.device)[phases]
        out = entries.new_zeros(len(places), entries.shape[1])
        for age in range(self.memory):
            out.add_(entries[places[:, age]].mul_(weights[:, age, None]))
        return out


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


def line_windows(code: Window, length: int) -> tuple[Tensor, Tensor]:
    """Return which bits of a line's stream each of its numbers sees, (length, memory), and its phase (length,)."""
    places, phases, first = [], [], 0
    for size in segments(length):
        seen, phase, total = windows(code.shifts, code.memory, size)
        places.append(first + seen)
        phases.append(phase)
        first += total
    return torch.cat(places), torch.cat(phases)


def every_window(memory: int) -> Tensor:
    """Return the bits of all windows, int64 (memory, 2**memory): the newest, which is the lowest of a state, first."""
    return torch.arange(1 << memory)[None] >> torch.arange(memory)[:, None] & 1
