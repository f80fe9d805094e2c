"""A span of columns while it is encoded: codes, and the scales that they are multiplied by, as float32 numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.gguf.types.base import CodedType, Fields

MOST_HALF = 65504.0


def to_half(numbers: Tensor, unit: float = 1.0) -> Tensor:
    """Return the nearest finite numbers of float16, times a unit, as float32."""
    return (numbers / unit).clamp(-MOST_HALF, MOST_HALF).to(torch.float16).to(torch.float32) * unit


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What some rows of a span hold: g blocks, k sub-blocks and w weights a row.

    A weight is `d * scale * level - dmin * min`; types without integer scales have ones, those without minima zeros.

    Attributes
    ----------
    levels : Tensor
        int8 (n, w).
    d, dmin : Tensor
        (n, g), numbers of float16, `d` times the type's unit.
    scales, mins : Tensor
        (n, k), whole numbers.
    """

    levels: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor
    mins: Tensor

    def steps(self) -> Tensor:
        """Return what a level is multiplied by, (n, k)."""
        return _spread(self.d, self.scales) * self.scales

    def floors(self) -> Tensor:
        """Return what is subtracted, (n, k)."""
        return _spread(self.dmin, self.mins) * self.mins

    def values(self) -> Tensor:
        """Return the weights (n, w)."""
        levels = self.levels.to(torch.float32).reshape(*self.scales.shape, -1)
        return (self.steps()[..., None] * levels - self.floors()[..., None]).reshape(self.levels.shape)

    @classmethod
    def beside(cls, spans: Sequence[State]) -> State:
        """Return the state of spans that lie beside one another."""
        return cls(*(torch.cat(parts, 1) for parts in zip(*(span.parts() for span in spans), strict=True)))

    def where(self, better: Tensor, other: State) -> State:
        """Return these rows where `better` (n,) says so, and those of the other state elsewhere."""
        pick = better[:, None]
        both = zip(self.parts(), other.parts(), strict=True)
        return State(*(torch.where(pick, mine, theirs) for mine, theirs in both))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the tensors, in the order of the fields."""
        return self.levels, self.d, self.scales, self.dmin, self.mins

    def fields(self, kind: CodedType) -> Fields:
        """Return the fields of the blocks, (n * g) in the order of a row."""
        blocks = self.levels.numel() // kind.block
        return kind.fields(self.levels.reshape(blocks, -1), self.d.reshape(-1), self.scales.reshape(blocks, -1),
                           self.dmin.reshape(-1), self.mins.reshape(blocks, -1))


def levels_of(kind: CodedType, like: Tensor) -> Tensor:
    """Return the levels of a type, float32, where a tensor is."""
    return torch.tensor(kind.levels, dtype=torch.float32, device=like.device)


def _spread(block: Tensor, sub: Tensor) -> Tensor:
    return block.repeat_interleave(sub.shape[1] // block.shape[1], 1)


def nearest(kind: CodedType, scaled: Tensor) -> Tensor:
    """Return the levels nearest to numbers, float32."""
    low, high = kind.levels[0], kind.levels[-1]
    if high - low == len(kind.levels) - 1:
        return scaled.round().clamp_(low, high)
    return _halfway(kind.levels)[(2.0 * scaled.clamp(low, high)).ceil().to(torch.int64) - 2 * low]


@functools.cache
def _halfway(levels: tuple[int, ...]) -> Tensor:
    """Return the level nearest to each half number from the least to the largest; the lower one halfway between."""
    table = torch.tensor(levels, dtype=torch.float32)
    halves = torch.arange(2 * levels[0], 2 * levels[-1] + 1, dtype=torch.float32) / 2
    return table[torch.bucketize(halves, (table[1:] + table[:-1]) / 2)]


def inverse(steps: Tensor) -> Tensor:
    """Return reciprocals, zero for zero."""
    return torch.where(steps == 0, 0.0, 1.0 / steps)
