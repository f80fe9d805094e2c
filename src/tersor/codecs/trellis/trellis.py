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
from tersor.codecs.trellis.filters import Filter, filters, taps_on
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.coordinates import Coordinates
from tersor.contract.feedback import encode_with_feedback
from tersor.contract.rotating import MultipliesRotated
from tersor.errors import CodecConfigError
from tersor.numerics.constants import constant
from tersor.ops.codebook_linear import codebook_linear
from tersor.ops.trellis_linear import decoded_rows, segments, trellis_filter, trellis_linear
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, row_rms

MEMORY = 12  # bits of the window where none are given
FEW = 64  # vectors that meet the signs of streams; for more, rows are decoded
BLOCK = 8  # columns that error feedback hands over together: 16 cost 1.1 % more error (docs/log.md)


@final
@dataclasses.dataclass(frozen=True)
class Trellis(MultipliesRotated):
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
        if self.axis == "in":
            return out, self.filter.line(width).stream
        return self.filter.line(out).stream, width

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
        if len(set(sizes)) == 1:
            return viterbi.encode(self.filter, numbers.reshape(-1, sizes[0])).reshape(len(numbers), -1)
        parts = numbers.split(sizes, 1)
        found: list[Tensor] = [numbers] * len(sizes)
        for size in set(sizes):
            places = [i for i, other in enumerate(sizes) if other == size]
            stacked = torch.cat([parts[i] for i in places]).contiguous()
            for i, bits in zip(places, viterbi.encode(self.filter, stacked).chunk(len(places)), strict=True):
                found[i] = bits
        return torch.cat(found, 1)

    def numbers(self, signs: Tensor, length: int, scales: Tensor | None = None) -> Tensor:
        """Return lines (*n, length) from the signs of their streams (*n, stream), times `scales` (length,)."""
        return trellis_filter(signs, taps_on(self.filter, signs.device), scales, self.filter.shifts, length)

    def filtered(self, lines: Tensor) -> Tensor:
        """Return what the signs of streams meet instead of lines, (*n, stream) for (*n, length)."""
        taps = taps_on(self.filter, lines.device)
        return trellis_filter(lines, taps, None, self.filter.shifts, lines.shape[-1], back=True)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return scaled numbers: a filter over the signs of the streams."""
        held, across = encoded.tensors, self.axis == "out"
        line = self.filter.line(encoded.shape[0 if across else 1])
        return decoded_rows(held["codes"], taps_on(self.filter, held["codes"].device), held["scales"], line,
                            encoded.shape[1], rows, across=across)

    def matmul_rotated(self, encoded: Encoded, x: Tensor, seed: int | None) -> Tensor | None:
        """Filter the vectors, or the outputs, and multiply by the signs; many vectors meet decoded rows."""
        width, held = encoded.shape[1], encoded.tensors
        many = x.is_cuda and x.numel() > FEW * width
        if seed is not None and (many or self.axis == "in"):
            return None
        if many:
            return trellis_linear(x, held["codes"], taps_on(self.filter, x.device), held["scales"], self.filter.shifts,
                                  across=self.axis == "out")
        table = _signs_on(x.device)
        if self.axis == "in":
            met = self.filtered(x)
            return codebook_linear(met, held["codes"], table, held["scales"][:, None], None, 1, met.shape[-1],
                                   "symmetric")
        ones = _ones_on(self._bits(encoded.shape)[0], x.device)
        y = codebook_linear(x, held["codes"], table, ones, None, 1, width, "symmetric", rotation=seed)
        return self.numbers(y, encoded.shape[0], held["scales"])

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
        return codec.filtered(x)

    def out_of(self, y: Tensor) -> Tensor:
        """Filter back."""
        codec = self.encoded.codec
        assert isinstance(codec, Trellis)
        return codec.numbers(y, self.encoded.shape[1])


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
        first = codec.filter.line(start).stream if start else 0
        self._bits[:, first : first + bits.shape[1]] = bits
        return codec.numbers(_signs(bits), columns.shape[1]) * scales

    def finish(self) -> Encoded:
        """Pack all bits; see `ColumnEncoder`."""
        return self._codec.close(self._shape, self._scales, self._bits)


def _signs(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2).sub_(1)


@constant
def _signs_on(device: torch.device) -> Tensor:
    """Return what a bit stands for."""
    return torch.tensor([-1.0, 1.0], device=device)


@constant
def _ones_on(count: int, device: torch.device) -> Tensor:
    """Return the scales of streams along outputs: the filter scales."""
    return torch.ones(count, 1, dtype=torch.bfloat16, device=device)
