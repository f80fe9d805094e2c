"""The family `trellis`: which window of a trellis code an effort takes, and ladders of such codes.

An effort is work of the encoder: a longer window has more states to look at, or more survivors to keep, and less error.
Bytes do not change, and decoders hardly. Below `LINEAR_FROM` bits codes are folded, because linear ones gain little
there. Short lines take the window that their circle of bits can hold; where there is
none, symmetric codebooks take a trellis's place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

import torch

from tersor.codecs import Dense, FoldedTrellis, Rotated, Sum, Symmetric, Trellis
from tersor.codecs.trellis.filters import shelf
from tersor.contract.codec import Codec
from tersor.families.ladder import Budgeted, Ladder
from tersor.numerics.settings import pinned
from tersor.ops.trellis_linear.shapes import segments
from tersor.payload.blocks import Shape

# bits of the window: a rate takes the longest packaged one up to so many, and where there is none, the shortest
WINDOWS: Mapping[str, float] = MappingProxyType({"fast": 9, "normal": 12, "best": 16})
LINEAR_FROM = 2.0  # bits a number: below, folded codes have 15 % less error
FAST, NORMAL = "fast", "normal"
CIRCLE = 5  # windows that a circle of bits has at least: with fewer, symmetric codebooks have less error (docs/log.md)
LEAST_LINE, LEAST_PART = 48, 64  # numbers of a line, and rows of either part of a mix whose lines are columns
BELOW = (4, 8, 10)  # bits of eight numbers of symmetric codebooks, below the least rate of a trellis
ABOVE = ((4.0, 1.5), (4.0, 2.0), (5.0, 2.0))  # rates of sums, beyond the highest rate of a trellis
HIGHEST = (32, 4.0)  # a symmetric codebook and a trellis: less error than two of either
SYMMETRIC_BITS = (4, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32)
SYMMETRIC_SECOND = (8, 16, 24, 32)
TRIED = 2.0  # bits a number of the code that surveys try in place of all others
_TRIED = (64, 256)  # normal numbers on which codes are compared: segments

Kind = type[Trellis] | type[FoldedTrellis]


def codebooks(scale: str) -> tuple[Codec, ...]:
    """Return symmetric codebooks of rising size; beyond the largest, sums with a second one."""
    single = tuple(Symmetric(bits, scale=scale) for bits in SYMMETRIC_BITS)
    return (*single, *(Sum((single[-1], Symmetric(bits, scale=scale))) for bits in SYMMETRIC_SECOND))


def window(kind: Kind, bits: float, effort: str, length: int = max(segments(1 << 20))) -> int | None:
    """Return the window that an effort takes at a rate that there is; None where segments are too short for all.

    Parameters
    ----------
    length : int
        Numbers of a segment.
    """
    held = length * bits / CIRCLE
    there = sorted(memory for rate, memory in kind.packaged() if rate == bits and memory <= held)
    return max((memory for memory in there if memory <= WINDOWS[effort]), default=there[0] if there else None)


def code(kind: Kind, bits: float, effort: str, axis: str, length: int) -> Codec:
    """Return the trellis code of a rate that there is, or the symmetric codebook that takes its place."""
    memory = window(kind, bits, effort, length)
    return Symmetric(round(8 * bits)) if memory is None else kind(bits, memory, axis)


def steps(kind: Kind, effort: str, axis: str, length: int) -> tuple[Codec, ...]:
    """Return the codes of a ladder, cheapest first; in sums, beyond a trellis's own rates, `fast` is as `normal`."""
    more = NORMAL if effort == FAST else effort

    def at(bits: float, effort: str = more) -> Codec:
        return code(FoldedTrellis if bits < LINEAR_FROM else kind, bits, effort, axis, length)

    rates = sorted({bits for one in (FoldedTrellis, kind) for bits, _ in one.packaged()
                    if one is kind or bits < LINEAR_FROM})
    below = (Symmetric(bits) for bits in BELOW if bits < 8 * rates[0])
    sums = (Sum((at(first), at(second))) for first, second in ABOVE)
    highest = Sum((Symmetric(HIGHEST[0]), at(HIGHEST[1])))
    return (*below, *(at(bits, effort) for bits in rates), *sums, highest)


@dataclasses.dataclass(frozen=True)
class TrellisLadder(Budgeted):
    """Trellis codes of all rates behind a rotation.

    Parameters
    ----------
    effort : str
    axis : str
        `"out"` for error feedback: lines are columns; `"in"` for a matrix by itself.
    kind : type
        `Trellis`, whose products are the fastest, or `FoldedTrellis`, which errs least.
    """

    effort: str
    axis: str = "in"
    kind: Kind = Trellis

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the costliest codec within `nbytes`; see `Budgeted.fit`."""
        return self._of(shape).fit(shape, nbytes)

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return every step as it is used on this shape, then plain numbers."""
        return self._of(shape).rungs(shape)

    def fixed(self) -> Sequence[Codec]:
        """Return every step as it is used on matrices that are large enough."""
        return _ladder(self.kind, self.effort, self.axis, min(segments(1 << 20))).fixed()

    def _of(self, shape: Shape) -> Ladder:
        length = shape[0 if self.axis == "out" else 1]
        return _ladder(self.kind, self.effort, self.axis, min(segments(length)))


@cache
def _ladder(kind: Kind, effort: str, axis: str, length: int) -> Ladder:
    """Return the ladder for segments of so many numbers."""
    tops = (Dense("bf16"), Dense("fp32"))
    if length < LEAST_LINE:
        return Ladder(codebooks("row"), Rotated, tops)
    return Ladder(steps(kind, effort, axis, length), Rotated, tops, LEAST_PART if axis == "out" else 1)


def stand_in(codec: Codec, shape: Shape) -> tuple[Codec, float]:
    """Return a codec that is tried in place of one of this family, and what its relative error is to be multiplied by.

    After a rotation all matrices are alike, so the ratio is that of normal numbers, and one code stands in for those of
    all rates: a short window on lines along inputs, which a sample of rows does not shorten. Without one, and in sums,
    whose later stages meet no normal numbers, a code of the same rate does. Other codecs stand for themselves.
    """
    if isinstance(codec, Rotated):
        return _stand_in_rotated(codec, shape)
    if isinstance(codec, Sum) and all(isinstance(part, (Trellis, FoldedTrellis, Symmetric)) for part in codec.stages):
        parts = [stand_in(part, shape) for part in codec.stages]
        return dataclasses.replace(codec, stages=tuple(part for part, _ in parts)), math.prod(f for _, f in parts)
    if not isinstance(codec, (Trellis, FoldedTrellis)):
        return codec, 1.0
    return _in_place_of(codec, type(codec), codec.bits, shape)


def _stand_in_rotated(codec: Rotated, shape: Shape) -> tuple[Codec, float]:
    inner, factor = stand_in(codec.inner, shape)
    if isinstance(codec.inner, (Trellis, FoldedTrellis)):
        inner, factor = _in_place_of(codec.inner, Trellis, TRIED, shape)
    return (codec if inner is codec.inner else dataclasses.replace(codec, inner=inner)), factor


def _in_place_of(codec: Trellis | FoldedTrellis, kind: Kind, bits: float, shape: Shape) -> tuple[Codec, float]:
    """Return a code of a rate along inputs, with a window of `fast`, and the ratio of errors; itself if none fits."""
    memory = window(kind, bits, FAST, min(segments(shape[1])))
    if memory is None:
        return codec, 1.0
    other = kind(bits, memory)
    return other, error_of(dataclasses.replace(codec, axis="in")) / error_of(other)


def error_of(codec: Codec) -> float:
    """Return the relative error of a packaged code along inputs on normal numbers, as `tried_on_normal` found it."""
    return shelf()["errors"][codec.spec()]


def tried_on_normal(codec: Codec) -> float:
    """Measure that error on normal numbers in segments of their own; `tools/measure_trellis.py` packages what it is."""
    numbers = torch.randn(*_TRIED, generator=torch.Generator().manual_seed(0))
    with pinned():
        off = codec.decode(codec.encode(numbers)) - numbers
    return float(off.square().sum() / numbers.square().sum())
