"""The family `trellis`: which window of a trellis code an effort takes, and ladders of such codes.

An effort is work of the encoder: a longer window has more states to look at, or more survivors to keep, and less error.
Bytes and decoders do not change. Where lines would be too short for a circle of bits, symmetric codebooks stand in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

import torch

from tersor.codecs import Dense, Rotated, Sum, Symmetric, Trellis
from tersor.codecs.trellis.filters import filters
from tersor.contract.codec import Codec
from tersor.families.ladder import Budgeted, Ladder
from tersor.numerics.settings import pinned
from tersor.payload.blocks import Shape

# bits of the window: a rate takes the longest packaged one up to so many, and where there is none, the shortest
WINDOWS: Mapping[str, float] = MappingProxyType({"fast": 9, "normal": 12, "best": math.inf})
FAST, NORMAL = "fast", "normal"
LEAST_LINE = 32  # numbers: shorter circles of bits have more error than symmetric codebooks (docs/log.md)
BELOW = (4, 8, 10)  # bits of eight numbers of symmetric codebooks, below the least rate of a trellis
ABOVE = ((4.0, 1.5), (4.0, 2.0), (5.0, 2.0))  # rates of sums, beyond the highest rate of a trellis
HIGHEST = (32, 4.0)  # a symmetric codebook and a trellis: less error than two of either
SYMMETRIC_BITS = (4, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32)
SYMMETRIC_SECOND = (8, 16, 24, 32)
_TRIED = (64, 256)  # normal numbers on which filters are compared: segments


def codebooks(scale: str) -> tuple[Codec, ...]:
    """Return symmetric codebooks of rising size; beyond the largest, sums with a second one."""
    single = tuple(Symmetric(bits, scale=scale) for bits in SYMMETRIC_BITS)
    return (*single, *(Sum((single[-1], Symmetric(bits, scale=scale))) for bits in SYMMETRIC_SECOND))


def window(bits: float, effort: str) -> int:
    """Return the window that an effort takes at a rate that there is."""
    there = sorted(memory for rate, memory in filters() if rate == bits)
    return max((memory for memory in there if memory <= WINDOWS[effort]), default=there[0])


@cache
def steps(effort: str, axis: str) -> tuple[Codec, ...]:
    """Return the codes of a ladder, cheapest first; in sums, beyond a trellis's own rates, `fast` is as `normal`."""
    own = tuple(Trellis(bits, window(bits, effort), axis) for bits in sorted({bits for bits, _ in filters()}))
    more = NORMAL if effort == FAST else effort

    def code(bits: float) -> Codec:
        return Trellis(bits, window(bits, more), axis)

    sums = tuple(Sum((code(first), code(second))) for first, second in ABOVE)
    return (*(Symmetric(bits) for bits in BELOW), *own, *sums, Sum((Symmetric(HIGHEST[0]), code(HIGHEST[1]))))


@dataclasses.dataclass(frozen=True)
class TrellisLadder(Budgeted):
    """Trellis codes of all rates behind a rotation, along the axis that a matrix's shape and use want.

    Parameters
    ----------
    effort : str
    fed : bool
        For error feedback, which wants lines along outputs; else lines run along inputs, where those are long enough.
    """

    effort: str
    fed: bool = False

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the costliest codec within `nbytes`; see `Budgeted.fit`."""
        return _ladder(self.effort, self._axis(shape)).fit(shape, nbytes)

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return every step as it is used on this shape, then plain numbers."""
        return _ladder(self.effort, self._axis(shape)).rungs(shape)

    def fixed(self) -> Sequence[Codec]:
        """Return every step as it is used on matrices that are large enough."""
        return _ladder(self.effort, "out" if self.fed else "in").fixed()

    def _axis(self, shape: Shape) -> str | None:
        """Return the axis of lines that are long enough, or None."""
        lengths = {"out": shape[0]} if self.fed else {"in": shape[1], "out": shape[0]}
        return next((axis for axis, length in lengths.items() if length >= LEAST_LINE), None)


@cache
def _ladder(effort: str, axis: str | None) -> Ladder:
    tops = (Dense("bf16"), Dense("fp32"))
    if axis is None:
        return Ladder(codebooks("row"), Rotated, tops)
    return Ladder(steps(effort, axis), Rotated, tops, LEAST_LINE if axis == "out" else 1)


def stand_in(codec: Codec, shape: Shape) -> tuple[Codec, float]:
    """Return a codec that is tried in place of one of this family, and what its distortion is to be multiplied by.

    The stand-in has windows of `fast`, and lines along inputs, which a sample of rows does not shorten. After a
    rotation all matrices are alike, so the ratio is that of normal numbers. Other codecs stand for themselves.
    """
    if isinstance(codec, Rotated):
        inner, factor = stand_in(codec.inner, shape)
        return (codec if inner is codec.inner else dataclasses.replace(codec, inner=inner)), factor
    if isinstance(codec, Sum) and all(isinstance(part, (Trellis, Symmetric)) for part in codec.stages):
        parts = [stand_in(part, shape) for part in codec.stages]
        return dataclasses.replace(codec, stages=tuple(part for part, _ in parts)), math.prod(f for _, f in parts)
    if not isinstance(codec, Trellis) or shape[1] < LEAST_LINE:
        return codec, 1.0
    fast = Trellis(codec.bits, window(codec.bits, FAST), "in")
    return fast, error_of(codec.bits, codec.memory) / error_of(fast.bits, fast.memory)


@cache
def error_of(bits: float, memory: int) -> float:
    """Return the relative error of a filter on normal numbers in segments of their own."""
    numbers = torch.randn(*_TRIED, generator=torch.Generator().manual_seed(0))
    codec = Trellis(bits, memory)
    with pinned():
        off = codec.decode(codec.encode(numbers)) - numbers
    return float(off.square().sum() / numbers.square().sum())
