"""What a line of a trellis code is: segments of numbers, each with a circle of bits; and what the kernels take."""

from __future__ import annotations

import dataclasses
from functools import cache, lru_cache

import torch
from torch import Tensor

SEGMENT = 256  # numbers, about
UNIT = 4  # numbers: periods divide it, so all segments but the last of a line hold whole periods
MOST_PERIOD = UNIT


@lru_cache(maxsize=64)
def segments(length: int) -> tuple[int, ...]:
    """Return the sizes of a line's segments, as even as whole units allow; the last takes the rest."""
    units = length // UNIT
    count = max(1, round(length / SEGMENT))
    sizes = [UNIT * ((i + 1) * units // count - i * units // count) for i in range(count)]
    sizes[-1] += length % UNIT
    return tuple(size for size in sizes if size)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of numbers and its stream.

    Attributes
    ----------
    length : int
        Numbers.
    shifts : tuple of int
        New bits a number, by phase.
    memory : int
        Bits of the window.
    """

    length: int
    shifts: tuple[int, ...]
    memory: int

    def bits(self, size: int) -> int:
        """Return the bits of a segment of `size` numbers."""
        whole, rest = divmod(size, len(self.shifts))
        return whole * sum(self.shifts) + sum(self.shifts[:rest])

    @property
    def stream(self) -> int:
        """Bits of all segments."""
        return _stream(self)

    def windows(self, size: int) -> tuple[Tensor, Tensor, int]:
        """Return which bits of a segment's circle each number sees, (size, memory), its phase (size,), and all bits."""
        phases = torch.arange(size) % len(self.shifts)
        entering = torch.tensor(self.shifts)[phases]
        total = int(entering.sum())
        newest = entering.cumsum(0) - 1
        return (newest[:, None] - torch.arange(self.memory)) % total, phases, total


@lru_cache(maxsize=64)
def _stream(line: Line) -> int:
    return sum(line.bits(size) for size in segments(line.length))


@lru_cache(maxsize=16)
def windows(line: Line) -> tuple[Tensor, Tensor]:
    """Return which bits of a line's stream each of its numbers sees, (length, memory), and its phase (length,)."""
    places, phases, first = [], [], 0
    for size in segments(line.length):
        seen, phase, total = line.windows(size)
        places.append(first + seen)
        phases.append(phase)
        first += total
    return torch.cat(places), torch.cat(phases)


@cache
def refusal(line: Line) -> str | None:
    """Return why the kernels do not take a line, or None: every circle must be as long as the window."""
    if len(line.shifts) > MOST_PERIOD or MOST_PERIOD % len(line.shifts):
        return f"expected a period of 1, 2 or {MOST_PERIOD}, found {len(line.shifts)}"
    least = min((line.bits(size) for size in segments(line.length)), default=0)
    return None if least >= line.memory else f"a circle of {least} bits is shorter than a window of {line.memory}"
