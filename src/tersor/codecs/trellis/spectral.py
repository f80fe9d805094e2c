"""Trellis codes over principal axes: each axis gets as many bits of one stream as its variance earns.

Rows that were trained on have few axes of large variance. Reverse water-filling (Cover and Thomas, Elements of
Information Theory, ch. 10.3) spends bits there and none on the least ones. Since a linear trellis code takes any number
of new bits at any step, all axes share one tail-biting stream, and a row is its scale times a matrix times signs.
Derivation and figures: docs/codecs/trellis.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter, filter_editions
from tersor.codecs.trellis.sharing import FINE, MEMORY, MOST_SHIFT, SHARED, SOURCES, code_of, shared_out
from tersor.codecs.trellis.streamed import signs_of
from tersor.contract.checks import shared_tables
from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.coordinates import Coordinates
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.ops.trellis_linear import Line, reference
from tersor.ops.trellis_path import Steps, best
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, row_rms

LEAST = 6  # bytes of a row: a circle of four windows; of less, its two ends cannot be made to meet well
ZERO = 128  # the byte of a number of an axis that is 0
FLAT = 2.0**-20  # of the largest deviation: less is none


@final
@dataclasses.dataclass(frozen=True)
class SpectralTrellis(Codec):
    """`row = scale Σ_i deviation_i c_i axis_i`, with `c` the numbers of a linear trellis code of varying rate.

    Axes, deviations and the bits of each axis are trained on sample matrices, whose mean should be 0. Deviations are
    shares of a number's root mean square, so that scales are such of the rows.

    Parameters
    ----------
    row_bytes : int
        Bytes of a row's stream, from 6 on. Its scale, bf16, takes two more.
    most_axes : int or None
        Most axes that have bits. They are stored as bytes: for sets so small that tables count. None: as many as there
        are, in fp16.
    """

    row_bytes: int
    most_axes: int | None = None

    id: ClassVar[str] = "spectral"
    version: ClassVar[int] = 2
    later: ClassVar[Mapping[str, tuple[int, Any]]] = MappingProxyType({"most_axes": (2, None)})
    grammar: ClassVar[str] = r"ktr(?P<bytes>\d{1,6})(?:a(?P<axes>\d{1,6}))?"
    examples: ClassVar[tuple[str, ...]] = ("ktr6", "ktr8", "ktr6a12")

    def __post_init__(self) -> None:
        if type(self.row_bytes) is not int or self.row_bytes < LEAST:
            raise CodecConfigError(f"spectral: row_bytes must be an integer of at least {LEAST}, found "
                                   f"{self.row_bytes!r}")
        if self.most_axes is not None and (type(self.most_axes) is not int or self.most_axes < 1):
            raise CodecConfigError(f"spectral: most_axes must be None or a positive integer, found {self.most_axes!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return `scales` and `codes`, and the shared `axes`, as columns, their `deviations` and kinds, `shifts`.

        Raises
        ------
        CodecConfigError
            If numbers would have more than 5 bits on average, or there are more axes than numbers.
        """
        rows, width = shape
        bits, axes = 8 * self.row_bytes, min(width, 8 * self.row_bytes)
        if bits > MOST_SHIFT * width:
            raise CodecConfigError(f"codec '{self.spec()}': {bits} bits are more than {MOST_SHIFT} a number at width "
                                   f"{width}; it needs a width of at least {-(-bits // MOST_SHIFT)}")
        if self.most_axes is not None:
            least = -(-bits // MOST_SHIFT)
            if not least <= self.most_axes <= axes:
                raise CodecConfigError(f"codec '{self.spec()}': expected {least} to {axes} axes at width {width}, "
                                       f"found {self.most_axes}")
            axes = self.most_axes
        kind = torch.float16 if self.most_axes is None else torch.uint8
        return {"scales": TensorSpec((rows,), torch.bfloat16), "codes": TensorSpec(self.stream_shape(shape), levels=2),
                "axes": TensorSpec((width, axes), kind, shared=True),
                "deviations": TensorSpec((axes,), torch.float32, shared=True),
                "shifts": TensorSpec((axes,), shared=True)}

    def package_tables(self) -> Mapping[str, int]:
        """Return the taps of the rates that an axis may have, in float32."""
        rates = *SOURCES.values(), *(place + 1.5 for place in range(len(SHARED)))
        found = {f"taps of tr{rate:g}": 4 * len(filter_editions()[rate, MEMORY, 1].taps) * MEMORY for rate in rates}
        return {**found, "taps of 6 and 7 bits": 4 * len(FINE) * MEMORY}

    def stream_shape(self, shape: Shape) -> Shape:
        """Return the shape of the bits, (out, stream)."""
        return shape[0], 8 * self.row_bytes

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Find the axes by the samples' second moments, and share out the bits."""
        del seed
        kept = list(samples)
        widths = {sample.shape[1] for sample in kept}
        if len(widths) != 1:
            raise CodecConfigError(f"codec '{self.spec()}': training needs sample matrices of one width, found widths "
                                   f"{sorted(widths)}")
        width = widths.pop()
        layout = self.layout((1, width))
        gram = torch.zeros(width, width, dtype=torch.float64, device=kept[0].device)
        for sample in kept:
            for block in row_blocks(shape_of(sample)):
                wide = sample[block].to(torch.float64)
                gram += wide.T @ wide
        total = float(gram.trace())
        gram *= width / total if total else 1.0
        power, axes = torch.linalg.eigh(gram)
        count = layout["shifts"].numel
        power, axes = power.flip(0)[:count].clamp_min(0), axes.flip(1)[:, :count]
        held = axes.to(torch.float16) if self.most_axes is None else _in_bytes(axes)
        return {"axes": held.contiguous(), "deviations": power.sqrt().to(torch.float32),
                "shifts": torch.tensor(shared_out(power.tolist(), 8 * self.row_bytes), dtype=torch.uint8,
                                       device=axes.device)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Take the rows to their axes, find the best paths, errors weighed as they count, then the best scales."""
        shape = shape_of(matrix)
        layout = self.layout(shape)
        tables = shared_tables(self.spec(), layout, how.tables, matrix.device)
        code, axes, deviations = self._tables(tables)
        table = code.table().to(matrix.device) * deviations[:, None]
        scales = torch.zeros(shape[0], dtype=torch.bfloat16, device=matrix.device)
        bits = torch.empty(layout["codes"].shape, dtype=torch.uint8, device=matrix.device)
        for block in row_blocks(shape):
            found = matrix[block].to(torch.float32) @ axes
            scale = bounded(row_rms(found * reciprocal(deviations)))
            numbers = found * reciprocal(scale)[:, None]
            if not bool(torch.isfinite(numbers).all()):
                raise NonFiniteError(f"codec '{self.spec()}': rows overflow float32 along the axes that it was trained "
                                     "on; train on such rows too, or scale them down")
            bits[block], made = best(numbers, table, Steps(MEMORY, code.shifts, linear=True))
            size = made.square().sum(1)
            gain = torch.where(size > 0, (numbers * made).sum(1).clamp_min(0) / size.clamp_min(1e-38), 1.0)
            scales[block] = bounded(scale.to(torch.float32) * gain)
        return Encoded(self, shape, {"scales": scales, "codes": packing.pack(bits, 2), **tables})

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the scales times the matrix times signs."""
        return self.coordinates(encoded).rows(rows) @ self._matrix(encoded.tensors).T

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the scaled signs."""
        return _Signs(encoded)

    def _tables(self, tensors: Tables) -> tuple[Filter, Tensor, Tensor]:
        """Return the code of the axes that have bits, those axes as columns, and their deviations, float32.

        Raises
        ------
        CorruptStoreError
            If the bits are not those of a row.
        """
        kinds = tensors["shifts"].tolist()
        code = _code_of(tuple(kind for kind in kinds if kind))
        if code is None or sum(code.shifts) != 8 * self.row_bytes:
            raise CorruptStoreError(f"codec '{self.spec()}': axes of kinds {kinds} are not those of a row of "
                                    f"{8 * self.row_bytes} bits")
        chosen = (tensors["shifts"] > 0).nonzero().squeeze(1)
        deviations = tensors["deviations"]
        deviations = torch.where(deviations > FLAT * deviations[:1], deviations, 0.0)[chosen]
        axes = tensors["axes"][:, chosen].to(torch.float32)
        if self.most_axes is not None:
            axes -= ZERO
            axes /= torch.linalg.vector_norm(axes, dim=0).clamp_min(1.0)
        return code, axes, deviations

    def _matrix(self, tensors: Tables) -> Tensor:
        """Return what takes signs to rows, float32 (width, stream)."""
        code, axes, deviations = self._tables(tensors)
        return (axes * deviations) @ _matrix_of(code).to(axes.device)

    def spec(self) -> str:
        """Return for example `ktr15`: 15 bytes a row; or `ktr15a90`: of at most 90 axes."""
        return f"ktr{self.row_bytes}{'' if self.most_axes is None else f'a{self.most_axes}'}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `ktr` strings; see `spec`."""
        del parts
        return cls(int(match["bytes"]), None if match["axes"] is None else int(match["axes"]))


class _Signs(Coordinates):
    """Signs of the streams, times their rows' scales: vectors meet the matrix that takes signs to rows."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__(encoded)
        codec = encoded.codec
        assert isinstance(codec, SpectralTrellis)
        self._codec = codec

    def rows(self, rows: Rows) -> Tensor:
        """Return scaled signs, float32 (k, stream)."""
        held = self.encoded.tensors
        signs = signs_of(codes.read(held["codes"], self._codec.stream_shape(self.encoded.shape), 2, rows))
        return signs * held["scales"].to(torch.float32)[rows, None]

    def into(self, x: Tensor) -> Tensor:
        """Meet the matrix."""
        return x @ self._codec._matrix(self.encoded.tensors)

    def out_of(self, y: Tensor) -> Tensor:
        """Take sums of signs to rows."""
        return y @ self._codec._matrix(self.encoded.tensors).T


def _in_bytes(axes: Tensor) -> Tensor:
    """Return axes, columns of length 1, as bytes: in steps of a 127th of the largest number, around `ZERO`."""
    most = axes.abs().amax(0).clamp_min(1e-30)
    return (axes / most * (ZERO - 1)).round().add_(ZERO).to(torch.uint8)


@lru_cache(maxsize=16)
def _code_of(kinds: tuple[int, ...]) -> Filter | None:
    """Return the code of axes, None where there is none."""
    try:
        return code_of(kinds)
    except ValueError:
        return None


@lru_cache(maxsize=16)
def _matrix_of(code: Filter) -> Tensor:
    """Return what takes signs to the numbers of the axes, float32 (axes, stream)."""
    count = len(code.shifts)
    return reference.matrix(code.taps_tensor(), Line(count, code.shifts, MEMORY), count).to(torch.float32)
