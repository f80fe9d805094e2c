"""Standardized columns: a mean and a root mean square a column, and the inner codec for what is left.

What scalar baselines of QET's literature do first: columns of K caches and of many weights differ in offset and scale.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.numerics.linalg import single_thread
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec

SUM_FLOATS = 1 << 20  # numbers summed at a time; fixed, because the order of a sum may show in its last bit


@final
@dataclasses.dataclass(frozen=True)
class Standardized(Codec):
    """`W = scale inner + mean` with a bf16 mean and a bf16 scale a column.

    The scale is the root mean square of what the stored mean leaves over, 1 where that is 0: a column of equal numbers
    decodes to their bf16 value plus what the inner codec makes of the rest.

    Parameters
    ----------
    inner : Codec
    """

    inner: Codec

    id: ClassVar[str] = "standardized"
    grammar: ClassVar[str] = r"std,"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec):
            raise CodecConfigError(f"standardized: inner must be a codec, found {self.inner!r}")

    def children(self) -> Mapping[str, Codec]:
        """Return the inner codec."""
        return {"inner": self.inner}

    def layout(self, shape: Shape) -> Layout:
        """Return `mean` and `scale`, one a column, and the inner codec's layout under `inner/`."""
        column = TensorSpec((shape[1],), torch.bfloat16)
        return {"mean": column, "scale": column, **nest("inner", self.inner.layout(shape))}

    def train(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train the inner codec on standardized samples."""
        with single_thread(), torch.no_grad():
            return nest_tensors("inner", self.inner.train((_standardize(s, *_moments(s)) for s in samples), seed=seed))

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Standardize the columns, carry the Hessian along, and encode with the inner codec."""
        shape = shape_of(matrix)
        self.layout(shape)
        mean, scale = _moments(matrix)
        encoded = self.inner.search(_standardize(matrix, mean, scale), _carried(how, scale))
        return self._close(shape, mean, scale, encoded)

    @property
    def column_wise(self) -> bool:
        """What the inner codec is."""
        return self.inner.column_wise

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return the inner codec's column encoder, standardizing on the way in and undoing it on the way out."""
        mean, scale = _moments(matrix)
        inner = self.inner.columns(_standardize(matrix, mean, scale), _carried(how, scale))
        return _Columns(self, shape_of(matrix), mean, scale, inner)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode the inner matrix, then scale and shift, by blocks."""
        out = self.inner.decode(self._child(encoded))
        for block in row_blocks(encoded.shape):
            out[block] = self._undo(out[block], encoded)
        return out

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Decode inner rows, then scale and shift."""
        return self._undo(self.inner.decode_rows(self._child(encoded), rows), encoded)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Scale the activations, multiply by the inner matrix, and add the product with the means."""
        wide = x.to(torch.float32)
        scale, mean = (encoded.tensors[name].to(torch.float32) for name in ("scale", "mean"))
        return (self.inner.matmul(self._child(encoded), wide * scale) + (wide @ mean).unsqueeze(-1)).to(x.dtype)

    def spec(self) -> str:
        """Return for example `std,lm3`."""
        return f"std,{self.inner.spec()}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `std,…`."""
        del match
        return cls(parts[0])

    def _child(self, encoded: Encoded) -> Encoded:
        return encoded.child("inner", self.inner, encoded.shape)

    def _close(self, shape: Shape, mean: Tensor, scale: Tensor, encoded: Encoded) -> Encoded:
        return Encoded(self, shape, {"mean": mean, "scale": scale, **nest_tensors("inner", encoded.tensors)})

    def _undo(self, rows: Tensor, encoded: Encoded) -> Tensor:
        scaled = rows * encoded.tensors["scale"].to(torch.float32)
        return scaled + encoded.tensors["mean"].to(torch.float32)


class _Columns(ColumnEncoder):
    """The inner column encoder, behind the standardization."""

    def __init__(self, codec: Standardized, shape: Shape, mean: Tensor, scale: Tensor, inner: ColumnEncoder) -> None:
        self.width = inner.width
        self._codec, self._shape, self._inner = codec, shape, inner
        self._mean, self._scale = mean, scale

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        chosen = slice(start, start + columns.shape[1])
        mean, scale = self._mean[chosen], self._scale[chosen]
        decoded = self._inner.block(start, _standardize(columns, mean, scale))
        return decoded * scale.to(torch.float32) + mean.to(torch.float32)

    def finish(self) -> Encoded:
        """Close the inner encoder; see `ColumnEncoder`."""
        return self._codec._close(self._shape, self._mean, self._scale, self._inner.finish())


def _moments(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stored mean and scale of every column, bf16 (in,); summed in float64."""
    step = max(1, SUM_FLOATS // matrix.shape[1])
    parts = [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
    zero = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    total = sum((matrix[part].sum(0, dtype=torch.float64) for part in parts), zero)
    mean = _round(total / matrix.shape[0])
    power = sum(((matrix[part].to(torch.float64) - mean.to(torch.float64)).square().sum(0) for part in parts), zero)
    scale = _round((power / matrix.shape[0]).sqrt())
    return mean, torch.where(scale > 0, scale, torch.ones_like(scale))


def _round(values: Tensor) -> Tensor:
    limit = torch.finfo(torch.bfloat16).max
    return values.clamp(-limit, limit).to(torch.bfloat16)


def _standardize(matrix: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return `(matrix - mean) / scale`, float32; in float64 between, where no column overflows or vanishes."""
    out = torch.empty(shape_of(matrix), dtype=torch.float32, device=matrix.device)
    shift, factor = mean.to(torch.float64), scale.to(torch.float64)
    for block in row_blocks(shape_of(matrix)):
        out[block] = ((matrix[block].to(torch.float64) - shift) / factor).to(torch.float32)
    return out


def _carried(how: Search, scale: Tensor) -> Search:
    """Return the inner search: its Hessian is `S H S`, S the scales over the largest of them (no unit matters)."""
    inner = how.inner("inner")
    if how.hessian is None:
        return inner
    factor = scale.to(torch.float64)
    factor = (factor / factor.max()).to(device=how.hessian.device)
    hessian = (how.hessian.to(torch.float64) * factor * factor.unsqueeze(-1)).to(torch.float32)
    return dataclasses.replace(inner, hessian=hessian)
