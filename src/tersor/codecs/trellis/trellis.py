"""Linear trellis codes: numbers are a filter's output over a stream of bits, so that products need no decoding.

The bit-shift trellis of QTIP (Tseng et al., arXiv 2406.11235) with tail-biting, and with a trained linear filter as the
value of its window. Mathematics, figures and prior art: docs/codecs/trellis.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.filters import Filter, filters, segment_matrix, segments, windows
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.coordinates import Coordinates
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError
from tersor.ops.codebook_linear import codebook_linear
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, row_rms

MEMORY = 12  # bits of the window where none are given
SIGNS = (-1.0, 1.0)
BLOCK = 8  # columns that error feedback hands over together: 16 cost 1.1 % more error (docs/log.md)


@final
@dataclasses.dataclass(frozen=True)
class Trellis(Codec):
    """Lines of the matrix, divided by their rows' scales, as tail-biting streams of `bits` bits a number.

    Parameters
    ----------
    bits : float
        Bits a number; see `filters` for those that there are.
    memory : int
        Bits of the window: 2**memory states for the encoder, and taps of the filter for the decoder.
    axis : str
        `"in"`: lines are rows; `"out"`: columns, which error feedback wants.

    Encoder options
    ---------------
    feedback : bool
        With a Hessian: encode with error feedback.
    """

    bits: float = 2.0
    memory: int = MEMORY
    axis: str = "in"

    id: ClassVar[str] = "trellis"
    grammar: ClassVar[str] = r"tr(?P<rate>\d+(?:\.\d+)?)(?:x(?P<memory>\d+))?(?P<axis>o?)"
    examples: ClassVar[tuple[str, ...]] = ("tr2x8", "tr3x9o", "tr2.5x8", "tr1.5x8o")
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"feedback"})

    def __post_init__(self) -> None:
        if self.axis not in ("in", "out"):
            raise CodecConfigError(f"trellis: axis must be 'in' or 'out', found {self.axis!r}")
        known = filters()
        if not isinstance(self.bits, (int, float)) or (self.bits, self.memory) not in known:
            raise CodecConfigError(f"trellis: there is no filter of {self.bits} bits and a memory of {self.memory}; "
                                   f"the nearest are {', '.join(_nearest(self.bits, self.memory))}")

    @property
    def filter(self) -> Filter:
        """The packaged filter."""
        return filters()[self.bits, self.memory]

    def package_tables(self) -> Mapping[str, int]:
        """Return the taps, in float32."""
        return {f"taps of tr{self.bits:g}x{self.memory}": 4 * len(self.filter.shifts) * self.memory}

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, the bits of the streams, and `scales`, one a row."""
        return {"scales": TensorSpec((shape[0],), torch.bfloat16), "codes": TensorSpec(self._bits(shape), levels=2)}

    def _bits(self, shape: Shape) -> Shape:
        """Return the shape of the bits: (out, stream) along inputs, (stream, in) along outputs."""
        out, width = shape
        return (out, self.filter.stream(width)) if self.axis == "in" else (self.filter.stream(out), width)

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Find the best path of every segment; with error feedback when asked for."""
        if how.feedback is not None:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        shape, scales = shape_of(matrix), bounded(row_rms(matrix))
        bits = torch.empty(self._bits(shape), dtype=torch.uint8, device=matrix.device)
        inverse = reciprocal(scales)[:, None]
        if self.axis == "in":
            for block in row_blocks(shape):
                bits[block] = self.lines(matrix[block].to(torch.float32) * inverse[block])
        else:
            for block in row_blocks((shape[1], shape[0])):
                bits[:, block] = self.lines((matrix[:, block].to(torch.float32) * inverse).T).T
        return self.close(shape, scales, bits)

    def close(self, shape: Shape, scales: Tensor, bits: Tensor) -> Encoded:
        """Return the encoded matrix of these scales and bits."""
        return Encoded(self, shape, {"scales": scales, "codes": packing.pack(bits, 2)})

    def lines(self, numbers: Tensor) -> Tensor:
        """Return the streams of lines of unit power, uint8 (n, stream), for float32 (n, length)."""
        sizes = segments(numbers.shape[1])
        parts = numbers.split(sizes, 1)
        found: list[Tensor] = [numbers] * len(sizes)
        for size in set(sizes):
            places = [i for i, other in enumerate(sizes) if other == size]
            stacked = torch.cat([parts[i] for i in places]).contiguous()
            for i, bits in zip(places, viterbi.encode(self.filter, stacked).chunk(len(places)), strict=True):
                found[i] = bits
        return torch.cat(found, 1)

    def numbers(self, signs: Tensor, length: int) -> Tensor:
        """Return lines (n, length) from the signs of their streams, float32 (n, stream).

        The filter is summed tap by tap, so that a line's numbers do not depend on the lines beside it.
        """
        sizes = segments(length)
        parts = signs.split([self.filter.bits(size) for size in sizes], 1)
        return torch.cat([_summed(self.filter, part, size) for part, size in zip(parts, sizes, strict=True)], 1)

    def filtered(self, lines: Tensor) -> Tensor:
        """Return what the signs of streams meet instead of lines, (n, stream) for (n, length): `numbers` transposed."""
        sizes = segments(lines.shape[1])
        return torch.cat([part @ segment_matrix(self.filter, size).to(part.device)
                          for part, size in zip(lines.split(sizes, 1), sizes, strict=True)], 1)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return scaled numbers: a filter over the signs of the streams."""
        scales = encoded.tensors["scales"].to(torch.float32)
        rows = rows.to(scales.device) if isinstance(rows, Tensor) else rows
        shape = self._bits(encoded.shape)
        if self.axis == "in":
            signs = _signs(codes.read(encoded.tensors["codes"], shape, 2, rows))
            return self.numbers(signs, encoded.shape[1]).mul_(scales[rows, None])
        return self._across(encoded, rows).mul_(scales[rows, None])

    def _across(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return unscaled rows of streams that run along outputs, from the bits that their windows hold."""
        out, device = encoded.shape[0], encoded.tensors["codes"].device
        index = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        place, weights = _line_windows(self.filter, out)
        place, weights = place.to(device)[index], weights.to(device)[index]
        needed, inverse = place.unique(return_inverse=True)
        signs = _signs(codes.read(encoded.tensors["codes"], self._bits(encoded.shape), 2, needed))
        taps = torch.zeros(len(index), len(needed), dtype=torch.float32, device=device)
        return taps.scatter_add_(1, inverse, weights) @ signs

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Filter the vectors, or the outputs, and multiply by the signs."""
        out, width = encoded.shape
        scales, table = encoded.tensors["scales"], torch.tensor(SIGNS, dtype=torch.float32, device=x.device)
        held = encoded.tensors["codes"]
        flat = x.reshape(-1, width).to(torch.float32)
        if self.axis == "in":
            met = self.filtered(flat)
            y = codebook_linear(met, held, table, scales[:, None], None, 1, met.shape[1], "symmetric")
        else:
            rows = self.filter.stream(out)
            ones = torch.ones(rows, 1, dtype=torch.bfloat16, device=x.device)
            y = self.numbers(codebook_linear(flat, held, table, ones, None, 1, width, "symmetric"), out)
            y = y * scales.to(torch.float32)
        return y.reshape(*x.shape[:-1], out).to(x.dtype)

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return signs, met by filtered vectors; decoded rows where streams run along outputs."""
        return _Streams(encoded) if self.axis == "in" else super().coordinates(encoded)

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return an encoder over blocks of columns, for streams along outputs; along inputs, over segments."""
        del how
        return _Columns(self, matrix)

    def spec(self) -> str:
        """Return for example `tr2`, `tr2.5x16`, `tr3o` (along outputs)."""
        memory = "" if self.memory == MEMORY else f"x{self.memory}"
        return f"tr{self.bits:g}{memory}{'o' if self.axis == 'out' else ''}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `tr` strings; see `spec`."""
        del parts
        return cls(float(match["rate"]), int(match["memory"] or MEMORY), "out" if match["axis"] else "in")


def _nearest(bits: object, memory: object) -> list[str]:
    """Return the factory strings of the filters nearest to what was asked for."""
    rate, window = (float(one) if isinstance(one, (int, float)) else 0.0 for one in (bits, memory))
    ordered = sorted(filters(), key=lambda one: (abs(one[0] - rate), abs(one[1] - window)))
    return [f"tr{one:g}" + ("" if window == MEMORY else f"x{window}") for one, window in ordered[:3]]


class _Streams(Coordinates):
    """Signs of the streams, times their rows' scales, as coordinates."""

    def rows(self, rows: Rows) -> Tensor:
        """Return scaled signs, float32 (k, stream)."""
        codec, held = self.encoded.codec, self.encoded.tensors
        assert isinstance(codec, Trellis)
        signs = _signs(codes.read(held["codes"], codec._bits(self.encoded.shape), 2, rows))
        return signs * held["scales"].to(torch.float32)[rows, None]

    def into(self, x: Tensor) -> Tensor:
        """Filter."""
        codec = self.encoded.codec
        assert isinstance(codec, Trellis)
        return codec.filtered(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def out_of(self, y: Tensor) -> Tensor:
        """Filter back."""
        codec = self.encoded.codec
        assert isinstance(codec, Trellis)
        width = self.encoded.shape[1]
        return codec.numbers(y.reshape(-1, y.shape[-1]), width).reshape(*y.shape[:-1], width)


class _Columns(ColumnEncoder):
    """Column encoder: blocks of columns along outputs, segments of rows along inputs."""

    def __init__(self, codec: Trellis, matrix: Tensor) -> None:
        self._codec, self._shape = codec, shape_of(matrix)
        self._scales = bounded(row_rms(matrix))
        self._bits = torch.empty(codec._bits(self._shape), dtype=torch.uint8, device=matrix.device)
        self._sizes = set(segments(self._shape[1]))
        self.width = BLOCK if codec.axis == "out" else self._shape[1] if len(self._sizes) > 1 else min(self._sizes)

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        codec, scales = self._codec, self._scales.to(torch.float32)[:, None]
        normal = columns * reciprocal(self._scales)[:, None]
        if codec.axis == "out":
            bits = codec.lines(normal.T)
            self._bits[:, start : start + columns.shape[1]] = bits.T
            return codec.numbers(_signs(bits), self._shape[0]).T * scales
        bits = codec.lines(normal)
        first = codec.filter.stream(start) if start else 0
        self._bits[:, first : first + bits.shape[1]] = bits
        return codec.numbers(_signs(bits), columns.shape[1]) * scales

    def finish(self) -> Encoded:
        """Pack all bits; see `ColumnEncoder`."""
        return self._codec.close(self._shape, self._scales, self._bits)


def _summed(code: Filter, signs: Tensor, size: int) -> Tensor:
    """Return a segment's numbers (n, size) from its signs (n, bits), tap by tap."""
    period, total = len(code.shifts), signs.shape[1]
    turns = -(-code.memory // total)  # of the circle that the first window reaches back
    circle = torch.cat([*[signs] * turns, signs], 1) if total else signs
    out = torch.zeros(len(signs), size, dtype=torch.float32, device=signs.device)
    for phase in range(min(period, size)):
        newest = turns * total + sum(code.shifts[: phase + 1]) - 1
        count = -(-(size - phase) // period)
        for age, tap in enumerate(code.taps[phase]):
            first = newest - age
            out[:, phase::period].add_(circle[:, first : first + (count - 1) * sum(code.shifts) + 1 : sum(code.shifts)],
                                       alpha=tap)
    return out


def _signs(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2).sub_(1)


def _line_windows(code: Filter, length: int) -> tuple[Tensor, Tensor]:
    """Return which bits of a line's stream each of its numbers is made of, and their weights: (length, memory)."""
    places, weights, first = [], [], 0
    for size in segments(length):
        seen, phases, total = windows(code.shifts, code.memory, size)
        places.append(first + seen)
        weights.append(code.taps_tensor().to(torch.float32)[phases])
        first += total
    return torch.cat(places), torch.cat(weights)
