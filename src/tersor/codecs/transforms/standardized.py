"""Standardized columns: a mean and a root mean square a column, and the inner codec for what is left.

What scalar baselines of QET's literature do first: columns of K caches and of many weights differ in offset and scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import ColumnEncoder, Encoded, Search, Traits
from tersor.contract.wrapper import Wrapped
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec

SUM_FLOATS = 1 << 20  # numbers summed at a time; fixed, because the order of a sum may show in its last bit


@final
@dataclasses.dataclass(frozen=True)
class Standardized(Wrapped):
    """`W = scale inner + mean` with a bf16 mean and a bf16 scale a column.

    The scale is the root mean square of what the stored mean leaves over. Where that is 0 the scale is 0 as well, so
    that a column of equal bf16 numbers is exact, whatever the inner codec makes of its zeros.
    """

    id: ClassVar[str] = "standardized"
    grammar: ClassVar[str] = r"std,"
    examples: ClassVar[tuple[str, ...]] = ("std,lm3", "std,swap1,pq2x3b8", "std,sym16m", "std,two2x2m")

    def own(self, shape: Shape) -> Layout:
        """Return `mean` and `scale`, one a column."""
        column = TensorSpec((shape[1],), torch.bfloat16)
        return {"mean": column, "scale": column}

    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Standardize the columns."""
        del how
        mean, scale = _moments(matrix)
        return _standardize(matrix, mean, scale), {"mean": mean, "scale": scale}

    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Scale and shift."""
        del rows
        scale, mean = (encoded.tensors[name].to(torch.float32) for name in ("scale", "mean"))
        return inner * scale + mean

    def carry(self, how: Search, own: Mapping[str, Tensor]) -> Search:
        """Return the inner search: its Hessian is `S H S`, S the scales over the largest of them (no unit matters)."""
        inner = super().carry(how, own)
        if how.hessian is None:
            return inner
        factor = own["scale"].to(torch.float64)
        factor = (factor / factor.max().clamp_min(torch.finfo(torch.float64).tiny)).to(device=how.hessian.device)
        hessian = (how.hessian.to(torch.float64) * factor * factor.unsqueeze(-1)).to(torch.float32)
        return dataclasses.replace(inner, hessian=hessian)

    def traits(self) -> Traits:
        """Return the inner codec's: columns are coded by themselves where its are."""
        return self.inner.traits()

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return the inner codec's column encoder, standardizing on the way in and undoing it on the way out."""
        changed, own = self.change(matrix, how)
        return _Columns(self, own, self.inner.columns(changed, self.carry(how, own)))

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Scale the activations, multiply by the inner matrix, and add the product with the means."""
        wide = x.to(torch.float32)
        scale, mean = (encoded.tensors[name].to(torch.float32) for name in ("scale", "mean"))
        return (self.inner.matmul(self.child(encoded), wide * scale) + (wide @ mean).unsqueeze(-1)).to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Multiply by the transposed inner matrix, scale, and add the means times the sum of the outputs."""
        wide = y.to(torch.float32)
        scale, mean = (encoded.tensors[name].to(torch.float32) for name in ("scale", "mean"))
        product = self.inner.matmul_transposed(self.child(encoded), wide)
        return (product * scale + wide.sum(-1, keepdim=True) * mean).to(y.dtype)

    def spec(self) -> str:
        """Return for example `std,lm3`."""
        return f"std,{self.inner.spec()}"


class _Columns(ColumnEncoder):
    """The inner column encoder, behind the standardization."""

    def __init__(self, codec: Standardized, own: Mapping[str, Tensor], inner: ColumnEncoder) -> None:
        self.width = inner.width
        self._codec, self._own, self._inner = codec, own, inner

    def edges(self, columns: int) -> list[int]:
        """Return the inner encoder's; see `ColumnEncoder`."""
        return self._inner.edges(columns)

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        chosen = slice(start, start + columns.shape[1])
        mean, scale = self._own["mean"][chosen], self._own["scale"][chosen]
        decoded = self._inner.block(start, _standardize(columns, mean, scale))
        return decoded * scale.to(torch.float32) + mean.to(torch.float32)

    def finish(self) -> Encoded:
        """Close the inner encoder; see `ColumnEncoder`."""
        return self._codec.close(self._own, self._inner.finish())


def _moments(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stored mean and scale of every column, bf16 (in,); summed in float64."""
    step = max(1, SUM_FLOATS // matrix.shape[1])
    parts = [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
    zero = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    total = sum((matrix[part].sum(0, dtype=torch.float64) for part in parts), zero)
    mean = _round(total / matrix.shape[0])
    power = sum(((matrix[part].to(torch.float64) - mean.to(torch.float64)).square().sum(0) for part in parts), zero)
    return mean, _round((power / matrix.shape[0]).sqrt())


def _round(values: Tensor) -> Tensor:
    limit = torch.finfo(torch.bfloat16).max
    return values.clamp(-limit, limit).to(torch.bfloat16)


def _standardize(matrix: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return `(matrix - mean) / scale`, float32; in float64 between, where no column overflows or vanishes.

    Columns of scale 0 give 0: of what their mean leaves over nothing is decoded.
    """
    out = torch.empty(shape_of(matrix), dtype=torch.float32, device=matrix.device)
    shift = mean.to(torch.float64)
    factor = torch.where(scale > 0, scale.to(torch.float64), torch.inf)
    for block in row_blocks(shape_of(matrix)):
        out[block] = ((matrix[block].to(torch.float64) - shift) / factor).to(torch.float32)
    return out
