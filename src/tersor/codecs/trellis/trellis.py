"""Linear trellis codes: numbers are a filter's output over a stream of bits, so that products need no decoding.

Mathematics, figures and prior art: docs/codecs/trellis.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter, filter_editions, taps_on
from tersor.codecs.trellis.streamed import Streamed, signs_of
from tersor.codecs.trellis.viterbi import image_on, values_on
from tersor.contract.codec import Encoded
from tersor.contract.coordinates import Coded, Coordinates
from tersor.contract.rotating import MultipliesRotated
from tersor.numerics.constants import constant
from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear import codebook_linear, ready_product, widened
from tersor.ops.hadamard import hadamard
from tersor.ops.trellis_linear import decoded_rows, ready_filter, trellis_filter, trellis_linear
from tersor.ops.trellis_product import most_counted, trellis_product
from tersor.ops.trellis_product import ready_product as ready_across
from tersor.ops.window_linear import MOST_MEMORY, takes, window_linear
from tersor.payload import codes
from tersor.payload.blocks import Few, Rows, Shape, after

FEW = 64  # vectors that meet the signs of streams, or windows; for more, rows are decoded
SIGNED = 8  # vectors that meet signs also where kernels look windows up: as many as one product of signs takes
HALF = 2  # bytes of a number


@final
@dataclasses.dataclass(frozen=True)
class Trellis(Streamed, MultipliesRotated):
    """Streams whose windows have a filter's numbers; fields and options are those of `Streamed`."""

    id: ClassVar[str] = "trellis"
    kind: ClassVar[str] = "filter"
    mark: ClassVar[str] = ""
    version: ClassVar[int] = 2
    grammar: ClassVar[str] = r"tr(?P<rate>\d+(?:\.\d+)?)(?:x(?P<memory>\d+))?(?P<axis>o?)(?:v(?P<edition>\d+))?"
    examples: ClassVar[tuple[str, ...]] = ("tr2x8", "tr3x9o", "tr2.5x8", "tr1.5x8o", "tr2x24")

    @classmethod
    def editions(cls) -> Mapping[tuple[float, int, int], Filter]:
        """See `Streamed.editions`."""
        return filter_editions()

    @property
    def filter(self) -> Filter:
        """The packaged filter."""
        code = self.code
        assert isinstance(code, Filter)
        return code

    def _values(self, device: torch.device) -> Tensor:
        return _values_on(*self.key, device)

    def package_tables(self) -> Mapping[str, int]:
        """Return the taps, in float32."""
        return {f"taps of {dataclasses.replace(self, axis='in').spec()}": 4 * len(self.code.shifts) * self.memory}

    def numbers(self, signs: Tensor, length: int, scales: Tensor | None = None) -> Tensor:
        """Return lines (*n, length) from the signs of their streams (*n, stream), times `scales` (length,)."""
        return trellis_filter(signs, taps_on(*self.key, signs.device), scales, self.filter.shifts, length)

    def filtered(self, lines: Tensor) -> Tensor:
        """Return what the signs of streams meet instead of lines, (*n, stream) for (*n, length)."""
        taps = taps_on(*self.key, lines.device)
        return trellis_filter(lines, taps, None, self.filter.shifts, lines.shape[-1], back=True)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return scaled numbers: a filter over the signs of the streams."""
        held, across = encoded.tensors, self.axis == "out"
        return decoded_rows(held["codes"], taps_on(*self.key, held["codes"].device), held["scales"],
                            self.line(encoded.shape), encoded.shape[1], rows, across=across)

    def matmul_rotated(self, encoded: Encoded, x: Tensor, seed: int | None) -> Tensor | None:
        """Filter the vectors, or the outputs, and multiply by the signs; many vectors meet decoded rows."""
        width, held = encoded.shape[1], encoded.tensors
        many, across = x.is_cuda and x.numel() > FEW * width, self.axis == "out"
        looked = self._looked_up(encoded, x, seed)
        if seed is not None and (many or looked or not across):
            return None
        if looked:
            image = _image_on(*self.key, x.device) if x.is_cuda else None
            return window_linear(x, held["codes"], self._values(x.device), held["scales"], self.filter.shifts,
                                 image, across=across)
        if many:
            return trellis_linear(x, held["codes"], taps_on(*self.key, x.device), held["scales"],
                                  self.filter.shifts, across=across)
        if across:
            return trellis_product(x, held["codes"], taps_on(*self.key, x.device), held["scales"],
                                   self.filter.shifts, rotation=seed)
        met = self.filtered(x if x.is_cuda else widened(x))
        return codebook_linear(met, held["codes"], _signs_on(x.device), held["scales"][:, None], None, 1,
                               met.shape[-1], "symmetric").to(x.dtype)

    def ready_rotated(self, encoded: Encoded, seed: int | None) -> Few | None:
        """See `MultipliesRotated.ready_rotated`; on CUDA any number of vectors goes the way that `matmul` takes."""
        held, line, width = encoded.tensors, self.line(encoded.shape), encoded.shape[1]
        taps = taps_on(*self.key, held["codes"].device)
        if self.axis == "out":
            few = ready_across(held["codes"], taps, held["scales"], line, width, rotation=seed)
        else:
            met = None if seed is not None else ready_filter(taps, None, line, back=True)
            table, shape = _signs_on(held["codes"].device), (line.stream, line.stream)
            few = after(ready_product(held["codes"], table, held["scales"][:, None], None, 1, shape, "symmetric"), met)
        if few is None or not held["codes"].is_cuda:
            return few

        def every(x: Tensor) -> Tensor:
            if x.numel() <= SIGNED * width or self._counted(encoded, x, seed):
                return few(x)
            y = self.matmul_rotated(encoded, x, seed)
            if y is None and seed is not None:
                y = self.matmul_rotated(encoded, hadamard(x, Rotation(width, seed)), None)
            assert y is not None
            return y

        return every

    def _looked_up(self, encoded: Encoded, x: Tensor, seed: int | None) -> bool:
        """Tell whether windows are looked up instead: by many vectors on the processor, and by some on CUDA."""
        if self.memory > MOST_MEMORY:
            return False
        width = encoded.shape[1]
        if not x.is_cuda:
            return x.numel() > FEW * width
        if not SIGNED * width < x.numel() <= FEW * width:
            return False
        return not self._counted(encoded, x, seed) and _looked_up(*self.key, encoded.shape, self.axis)

    def _counted(self, encoded: Encoded, x: Tensor, seed: int | None) -> bool:
        """Tell whether CUDA counts the bits that signs share with rotated vectors."""
        if self.axis == "in" or seed is None or x.element_size() != HALF:
            return False
        return x.numel() <= _most_counted(*self.key, encoded.shape) * encoded.shape[1]

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return signs, met by filtered vectors; decoded rows where streams run along outputs."""
        return _Streams(encoded) if self.axis == "in" else super().coordinates(encoded)


class _Streams(Coordinates):
    """Signs of the streams, times their rows' scales, as coordinates."""

    def rows(self, rows: Rows) -> Tensor:
        """Return scaled signs, float32 (k, stream)."""
        codec, held = self.encoded.codec, self.encoded.tensors
        assert isinstance(codec, Trellis)
        signs = signs_of(codes.read(held["codes"], codec.stream_shape(self.encoded.shape), 2, rows))
        return signs * held["scales"].to(torch.float32)[rows, None]

    def coded(self) -> Coded | None:
        """Return the signs, where the streams of rows fill whole bytes."""
        codec = self.encoded.codec
        assert isinstance(codec, Trellis)
        if codec.stream_shape(self.encoded.shape)[1] % 8:
            return None
        return Coded("codes", "scales", 1, _signs_on(self.encoded.device), None,
                     taps=codec.filter.circle(self.encoded.shape[1]))

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


@constant
def _looked_up(bits: float, memory: int, edition: int, shape: Shape, axis: str) -> bool:
    """Tell whether kernels look the windows of a matrix up."""
    line = filter_editions()[bits, memory, edition].line(shape[0 if axis == "out" else 1])
    return takes(line, *shape, across=axis == "out", linear=True)


@constant
def _most_counted(bits: float, memory: int, edition: int, shape: Shape) -> int:
    """Return up to how many rotated vectors of 16 bits kernels count the bits of, for a matrix along outputs."""
    return most_counted(filter_editions()[bits, memory, edition].line(shape[0]), shape[1])


@constant
def _signs_on(device: torch.device) -> Tensor:
    """Return what a bit stands for."""
    return torch.tensor([-1.0, 1.0], dtype=torch.float32, device=device)


@constant
def _values_on(bits: float, memory: int, edition: int, device: torch.device) -> Tensor:
    return values_on(filter_editions()[bits, memory, edition], device)


@constant
def _image_on(bits: float, memory: int, edition: int, device: torch.device) -> Tensor:
    return image_on(filter_editions()[bits, memory, edition], device)
