"""What trellis codecs share: lines of a matrix as streams of bits, over which a window slides.

The bit-shift trellis of QTIP (Tseng et al., arXiv 2406.11235) with tail-biting. Children say which numbers windows
have. Mathematics, figures and prior art: docs/codecs/trellis.md.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.windows import Window, newest
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError
from tersor.ops.trellis_linear.shapes import Line, segments, windows
from tersor.ops.window_linear import MOST_MEMORY, decoded_rows
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, row_rms

MEMORY = 12  # bits of the window where none are given
MOST_BEAM = 1 << 16
BLOCK = 8  # columns that error feedback hands over together: 16 cost 1.1 % more error (docs/log.md)


@dataclasses.dataclass(frozen=True)
class Streamed(Codec):
    """Lines of the matrix, divided by their rows' scales, as tail-biting streams of `bits` bits a number.

    Parameters
    ----------
    bits : float
        Bits a number; see `packaged` for those that there are.
    memory : int
        Bits of the window: 2**memory states for the encoder, and weights of a number for the decoder.
    axis : str
        `"in"`: lines are rows; `"out"`: columns, which error feedback wants.
    edition : int
        Which of the codes of that rate and window, in the order in which they came; 0, the default, becomes the last.

    Encoder options
    ---------------
    feedback : bool
        With a Hessian: encode with error feedback.
    beam : int
        Survivors of the search for a path, instead of all states; 1,024 where windows have more than 16 bits.
    """

    bits: float = 2.0
    memory: int = MEMORY
    axis: str = "in"
    edition: int = 0

    kind: ClassVar[str]  # what a packaged code is called
    mark: ClassVar[str]  # behind the rate in factory strings
    later: ClassVar[Mapping[str, tuple[int, Any]]] = MappingProxyType({"edition": (2, 1)})
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"feedback", "beam"})

    def __post_init__(self) -> None:
        if self.axis not in ("in", "out"):
            raise CodecConfigError(f"{self.id}: axis must be 'in' or 'out', found {self.axis!r}")
        known = isinstance(self.bits, (int, float)) and type(self.memory) is int
        if not known or (self.bits, self.memory) not in self.packaged():
            raise CodecConfigError(f"{self.id}: there is no {self.kind} of {self.bits} bits and a memory of "
                                   f"{self.memory}; the nearest are {', '.join(self._nearest())}")
        if type(self.edition) is not int or not 0 <= self.edition <= self._last():
            raise CodecConfigError(f"{self.id}: editions of {self._named(self.bits, self.memory)} are 1 to "
                                   f"{self._last()}, found {self.edition!r}; a later one needs a later tersor")
        if not self.edition:
            object.__setattr__(self, "edition", self._last())
        assert self.code  # is found now, so that `torch.compile` does not trace how

    @classmethod
    @abc.abstractmethod
    def editions(cls) -> Mapping[tuple[float, int, int], Window]:
        """Return the codes that come with the package, by rate, memory and edition."""

    @classmethod
    def packaged(cls) -> Mapping[tuple[float, int], Window]:
        """Return those of the last editions, by rate and memory."""
        return _newest(cls)

    @cached_property
    def code(self) -> Window:
        """The packaged code."""
        return self.editions()[self.key]

    @property
    def key(self) -> tuple[float, int, int]:
        """By what `editions` has the code: plain values, from which constants are made."""
        return self.bits, self.memory, self.edition

    def _last(self) -> int:
        """Return the last edition of the rate and window."""
        return max(edition for *code, edition in self.editions() if code == [self.bits, self.memory])

    @abc.abstractmethod
    def _values(self, device: torch.device) -> Tensor:
        """Return the numbers of all windows, `viterbi.values_on`: by plain values, so that no graph is of how."""

    @classmethod
    def _named(cls, bits: float, memory: int, axis: str = "in") -> str:
        """Return a factory string."""
        window = "" if memory == MEMORY else f"x{memory}"
        return f"tr{bits:g}{cls.mark}{window}{'o' if axis == 'out' else ''}"

    def _nearest(self) -> list[str]:
        """Return the factory strings of the codes nearest to what was asked for."""
        rate, memory = (float(one) if isinstance(one, (int, float)) else 0.0 for one in (self.bits, self.memory))
        ordered = sorted(self.packaged(), key=lambda one: (abs(one[0] - rate), abs(one[1] - memory)))
        return [self._named(*one) for one in ordered[:3]]

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, the bits of the streams, and `scales`, one a row."""
        return {"scales": TensorSpec((shape[0],), torch.bfloat16),
                "codes": TensorSpec(self.stream_shape(shape), levels=2)}

    def stream_shape(self, shape: Shape) -> Shape:
        """Return the shape of the bits: (out, stream) along inputs, (stream, in) along outputs."""
        out, width = shape
        return (out, self.code.stream(width)) if self.axis == "in" else (self.code.stream(out), width)

    def line(self, shape: Shape) -> Line:
        """Return what a line of a matrix of a shape is."""
        return self.code.line(shape[1 if self.axis == "in" else 0])

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Find the best path of every segment, then the best scale of every row; with error feedback when asked for."""
        if how.feedback is not None:
            return self._rescaled(encode_with_feedback(self.columns(matrix, how), matrix, how.feedback), matrix,
                                  how.feedback.to(torch.float32))
        shape, scales, width = shape_of(matrix), bounded(row_rms(matrix)), _width(how)
        bits = torch.empty(self.stream_shape(shape), dtype=torch.uint8, device=matrix.device)
        inverse = reciprocal(scales)[:, None]
        fit = torch.zeros(2, shape[0], dtype=torch.float32, device=matrix.device)
        if self.axis == "in":
            for block in row_blocks(shape):
                numbers = matrix[block].to(torch.float32) * inverse[block]
                bits[block], made = self.lines(numbers, width)
                fit[:, block] = _products(numbers, made, 1)
        else:
            for block in row_blocks((shape[1], shape[0])):
                numbers = (matrix[:, block].to(torch.float32) * inverse).T
                streams, made = self.lines(numbers, width)
                bits[:, block] = streams.T
                fit += _products(numbers, made, 0)
        return self.close(shape, _times_gain(scales, fit), bits)

    def _rescaled(self, encoded: Encoded, matrix: Tensor, hessian: Tensor) -> Encoded:
        """Return the encoded matrix with the best scales under a Hessian, float32 (in, in)."""
        scales = encoded.tensors["scales"]
        fit = torch.zeros(2, len(scales), dtype=torch.float32, device=scales.device)
        for block in row_blocks(encoded.shape):
            made = self.decode_rows(encoded, block)
            met = made @ hessian
            fit[:, block] = torch.stack([(matrix[block] * met).sum(1), (made * met).sum(1)])
        return Encoded(self, encoded.shape, {**encoded.tensors, "scales": _times_gain(scales, fit)})

    def close(self, shape: Shape, scales: Tensor, bits: Tensor) -> Encoded:
        """Return the encoded matrix of these scales and bits."""
        return Encoded(self, shape, {"scales": scales, "codes": packing.pack(bits, 2)})

    def lines(self, numbers: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the streams of lines of unit power, uint8 (n, stream), and what they decode to, for (n, length)."""
        sizes = segments(numbers.shape[1])
        if len(set(sizes)) == 1:
            bits, made = viterbi.coded(self.code, numbers.reshape(-1, sizes[0]), width)
            return bits.reshape(len(numbers), -1), made.reshape(numbers.shape)
        parts = numbers.split(sizes, 1)
        found: list[tuple[Tensor, Tensor]] = [(numbers, numbers)] * len(sizes)
        for size in set(sizes):
            places = [i for i, other in enumerate(sizes) if other == size]
            stacked = torch.cat([parts[i] for i in places]).contiguous()
            coded = (one.chunk(len(places)) for one in viterbi.coded(self.code, stacked, width))
            for i, *both in zip(places, *coded, strict=True):
                found[i] = tuple(both)
        bits, made = zip(*found, strict=True)
        return torch.cat(bits, 1), torch.cat(made, 1)

    def numbers(self, signs: Tensor, length: int) -> Tensor:
        """Return lines (n, length) from the signs of their streams, float32 (n, stream)."""
        sizes = segments(length)
        parts = signs.split([self.code.bits(size) for size in sizes], 1)
        return torch.cat([self.code.numbers(part, size) for part, size in zip(parts, sizes, strict=True)], 1)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return scaled numbers: those of the windows over the streams; by a table where they are short enough."""
        if self.memory <= MOST_MEMORY:
            held = encoded.tensors
            return decoded_rows(held["codes"], self._values(held["codes"].device), held["scales"],
                                self.line(encoded.shape), encoded.shape[1], rows, across=self.axis == "out")
        scales = encoded.tensors["scales"].to(torch.float32)
        rows = rows.to(scales.device) if isinstance(rows, Tensor) else rows
        shape = self.stream_shape(encoded.shape)
        if self.axis == "in":
            signs = signs_of(codes.read(encoded.tensors["codes"], shape, 2, rows))
            return self.numbers(signs, encoded.shape[1]).mul_(scales[rows, None])
        return self._across(encoded, rows).mul_(scales[rows, None])

    def _across(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return unscaled rows of streams that run along outputs, from the bits that their windows hold."""
        out, device = encoded.shape[0], encoded.tensors["codes"].device
        index = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        places, phases = windows(self.code.line(out))
        needed, inverse = places.to(device)[index].unique(return_inverse=True)
        signs = signs_of(codes.read(encoded.tensors["codes"], self.stream_shape(encoded.shape), 2, needed))
        return self.code.numbers_at(signs, inverse, phases.to(device)[index])

    def row_scales(self, encoded: Encoded) -> Mapping[str, Rows]:
        """See `Codec.row_scales`."""
        return {"scales": slice(0, encoded.shape[0])}

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return an encoder over blocks of columns, for streams along outputs; along inputs, over segments."""
        return _Columns(self, matrix, _width(how))

    def spec(self) -> str:
        """Return for example `tr2`, `tr2.5x16`, `tr3o` (along outputs), `tr2n` (folded), `tr2x16v1` (an edition)."""
        named = self._named(self.bits, self.memory, self.axis)
        return named if self.edition == self._last() else f"{named}v{self.edition}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `tr` strings; see `spec`."""
        del parts
        if match["edition"] is not None and int(match["edition"]) == 0:
            raise CodecConfigError(f"codec string '{match[0]}': editions are numbered from 1 on")
        return cls(float(match["rate"]), int(match["memory"] or MEMORY), "out" if match["axis"] else "in",
                   int(match["edition"] or 0))


class _Columns(ColumnEncoder):
    """Column encoder: blocks of columns along outputs, segments of rows along inputs."""

    def __init__(self, codec: Streamed, matrix: Tensor, width: int | None) -> None:
        self._codec, self._shape, self._beam = codec, shape_of(matrix), width
        self._scales = bounded(row_rms(matrix))
        self._wide, self._inverse = self._scales.to(torch.float32)[:, None], reciprocal(self._scales)[:, None]
        self._bits = torch.empty(codec.stream_shape(self._shape), dtype=torch.uint8, device=matrix.device)
        self._sizes = set(segments(self._shape[1]))
        self.width = BLOCK if codec.axis == "out" else self._shape[1] if len(self._sizes) > 1 else min(self._sizes)

    def edges(self, columns: int) -> list[int]:
        """Return where blocks of columns begin, or, along inputs, segments; see `ColumnEncoder`."""
        if self._codec.axis == "out":
            return super().edges(columns)
        return [0, *itertools.accumulate(segments(columns))]

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        codec = self._codec
        if codec.axis == "out":
            normal = torch.empty(columns.shape[::-1], dtype=torch.float32, device=columns.device)
            torch.mul(columns.T, self._inverse.T, out=normal)  # lines one after another: one launch for both
            streams, made = codec.lines(normal, self._beam)
            self._bits[:, start : start + columns.shape[1]] = streams.T
            return made.T * self._wide
        streams, made = codec.lines(columns * self._inverse, self._beam)
        first = codec.code.stream(start) if start else 0
        self._bits[:, first : first + streams.shape[1]] = streams
        return made * self._wide

    def finish(self) -> Encoded:
        """Pack all bits; see `ColumnEncoder`."""
        return self._codec.close(self._shape, self._scales, self._bits)


@cache
def _newest(kind: type[Streamed]) -> Mapping[tuple[float, int], Window]:
    return newest(kind.editions())


def signs_of(bits: Tensor) -> Tensor:
    """Return -1 and 1 for bits, float32."""
    return bits.to(torch.float32).mul_(2).sub_(1)


def _times_gain(scales: Tensor, fit: Tensor) -> Tensor:
    """Return scales times the quotients of two inner products, (2, n), none below 0: bf16."""
    gain = torch.where(fit[1] > 0, fit[0].clamp_min(0) / fit[1], torch.ones_like(fit[0]))
    return bounded(scales.to(torch.float32) * gain)


def _products(numbers: Tensor, made: Tensor, axis: int) -> Tensor:
    """Return the inner products of numbers and what they decode to, and of the latter with itself, over an axis."""
    return torch.stack([(numbers * made).sum(axis), made.square().sum(axis)])


def _width(how: Search) -> int | None:
    """Return the survivors of a beam that were asked for."""
    width = how.options.get("beam")
    if width is not None and (not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= MOST_BEAM):
        raise CodecConfigError(f"beam is a whole number of survivors, 1 to {MOST_BEAM}, found {width!r}")
    return width
