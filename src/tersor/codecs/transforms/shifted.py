"""Normalize and shift: one factor and one offset for a whole matrix, fitted to what the inner codec decodes.

The last step of LPLR for images (Saha, Srivastava, Pilanci 2023, released code): `α L R + β 1 1ᵀ`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Encoded, Search
from tersor.contract.wrapper import Wrapped
from tersor.payload.blocks import Rows, Shape
from tersor.payload.layout import Layout, TensorSpec

SUM_FLOATS = 1 << 20  # numbers summed at a time; fixed, because the order of a sum may show in its last bit
DEGENERATE = 1e-12  # share of the decoded energy beyond its mean, below which rounding decides what the factor is


@final
@dataclasses.dataclass(frozen=True)
class Shifted(Wrapped):
    """`W = α inner + β`, two fp32 numbers a matrix, by least squares on the decoded inner matrix.

    Under a Hessian the squares are weighed by it. Where the inner matrix is constant, α is 1 and β the mean left over.
    """

    id: ClassVar[str] = "shifted"
    grammar: ClassVar[str] = r"ns,"
    examples: ClassVar[tuple[str, ...]] = ("ns,mm1", "ns,lm2", "ns,lr2(mm4;mm8)")

    def own(self, shape: Shape) -> Layout:
        """Return `affine`, which is α and β."""
        del shape
        return {"affine": TensorSpec((2,), torch.float32)}

    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Leave the matrix as it is; α and β follow from what the inner codec makes of it."""
        del how
        return matrix, {}

    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Scale and shift."""
        del rows
        factor, shift = encoded.tensors["affine"]
        return inner * factor + shift

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Encode with the inner codec, then fit α and β."""
        return self.around(self.inner.search(matrix, how.inner("inner")), matrix, how.hessian)

    def around(self, inner: Encoded, matrix: Tensor, hessian: Tensor | None = None) -> Encoded:
        """Return the encoded matrix made of `inner` and the α and β that fit it to `matrix` (out, in) best."""
        affine = torch.tensor(fit(matrix, inner.decode(), hessian), dtype=torch.float32, device=matrix.device)
        return self.close({"affine": affine}, inner)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Return α times the inner product, plus β times the sum of the activations."""
        factor, shift = encoded.tensors["affine"]
        wide = x.to(torch.float32)
        product = self.inner.matmul(self.child(encoded), wide)
        return (product * factor + wide.sum(-1, keepdim=True) * shift).to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Return α times the inner product, plus β times the sum of the outputs."""
        factor, shift = encoded.tensors["affine"]
        wide = y.to(torch.float32)
        product = self.inner.matmul_transposed(self.child(encoded), wide)
        return (product * factor + wide.sum(-1, keepdim=True) * shift).to(y.dtype)

    def spec(self) -> str:
        """Return for example `ns,lr64(mm8;mm8)`."""
        return f"ns,{self.inner.spec()}"


def fit(matrix: Tensor, decoded: Tensor, hessian: Tensor | None = None) -> tuple[float, float]:
    """Return the α and β that minimize `‖matrix - α decoded - β‖²`, or its weighing by a Hessian (in, in).

    With sums over all n entries, `α = (⟨A, Y⟩ - ΣA ΣY / n) / (‖Y‖² - (ΣY)² / n)` and `β = (ΣA - α ΣY) / n`; in float64,
    on numbers scaled to at most 1. Where Y is constant, α is 1; where α or β is beyond float32, returns (1, 0).
    """
    peak = max(float(matrix.max()), -float(matrix.min()), float(decoded.max()), -float(decoded.min()))
    scale = 2.0 ** -math.frexp(peak)[1]
    metric = None if hessian is None else hessian.to(torch.float32)
    step = max(1, SUM_FLOATS // matrix.shape[1])
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, matrix.shape[0], step):
        block = slice(start, start + step)
        a, y = (part[block].to(torch.float64) * scale for part in (matrix, decoded))
        ga, gy = (part if metric is None else (part.to(torch.float32) @ metric).to(torch.float64) for part in (a, y))
        sums += torch.stack([(gy * a).sum(), (gy * y).sum(), ga.sum(), gy.sum()]).cpu()
    ay, yy, a1, y1 = sums.tolist()
    ones = matrix.shape[0] * (matrix.shape[1] if hessian is None else float(hessian.sum(dtype=torch.float64)))
    spread = yy * ones - y1 * y1
    factor = (ay * ones - a1 * y1) / spread if spread > DEGENERATE * yy * ones else 1.0
    shift = (a1 - factor * y1) / ones / scale if ones > 0 else 0.0
    limit = torch.finfo(torch.float32).max
    if max(abs(factor), abs(shift)) > limit:
        return 1.0, 0.0
    return factor, shift
