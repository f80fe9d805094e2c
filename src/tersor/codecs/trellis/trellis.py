"""Linear trellis codes: numbers are a filter's output over a stream of bits, so that products need no decoding.

Mathematics, figures and prior art: docs/codecs/trellis.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter, filters, segment_matrix
from tersor.codecs.trellis.streamed import Streamed, signs_of
from tersor.codecs.trellis.windows import segments
from tersor.contract.codec import Encoded
from tersor.contract.coordinates import Coordinates
from tersor.ops.codebook_linear import codebook_linear
from tersor.payload import codes
from tersor.payload.blocks import Rows

SIGNS = (-1.0, 1.0)


@final
@dataclasses.dataclass(frozen=True)
class Trellis(Streamed):
    """Streams whose windows have a filter's numbers; fields and options are those of `Streamed`."""

    id: ClassVar[str] = "trellis"
    mark: ClassVar[str] = ""
    grammar: ClassVar[str] = r"tr(?P<rate>\d+(?:\.\d+)?)(?:x(?P<memory>\d+))?(?P<axis>o?)"
    examples: ClassVar[tuple[str, ...]] = ("tr2x8", "tr3x9o", "tr2.5x8", "tr1.5x8o")

    @classmethod
    def packaged(cls) -> Mapping[tuple[float, int], Filter]:
        """See `Streamed.packaged`."""
        return filters()

    @property
    def filter(self) -> Filter:
        """The packaged filter."""
        return filters()[self.bits, self.memory]

    def package_tables(self) -> Mapping[str, int]:
        """Return the taps, in float32."""
        return {f"taps of {self._named(self.bits, self.memory)}": 4 * len(self.code.shifts) * self.memory}

    def filtered(self, lines: Tensor) -> Tensor:
        """Return what the signs of streams meet instead of lines, (n, stream) for (n, length): `numbers` transposed."""
        sizes = segments(lines.shape[1])
        return torch.cat([part @ segment_matrix(self.filter, size).to(part.device)
                          for part, size in zip(lines.split(sizes, 1), sizes, strict=True)], 1)

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
            rows = self.code.stream(out)
            ones = torch.ones(rows, 1, dtype=torch.bfloat16, device=x.device)
            y = self.numbers(codebook_linear(flat, held, table, ones, None, 1, width, "symmetric"), out)
            y = y * scales.to(torch.float32)
        return y.reshape(*x.shape[:-1], out).to(x.dtype)

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
