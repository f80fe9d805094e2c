"""Gauge-fixed low rank: some rows of the matrix, and what all others are of them; r (d1 + d2 - r) numbers.

The interpolative decomposition as storage (as in PIFA, arXiv 2501.19090); see docs/codecs/interpolative.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.low_rank.pivots import interpolate
from tersor.contract.codec import Codec, Encoded, Search, Traits
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.packing import pack, unpack

AXES = ("rows", "columns")
NOISE = 2.0**-46  # of the largest entry of a factor: what float64 sums of thousands of terms are wrong by


@final
@dataclasses.dataclass(frozen=True)
class Interpolative(Codec):
    """`W = P [I; Z] C` with C some rows of W, or `W = C [I Z] Pᵀ` with C some columns.

    Which rows (columns) is one bit each. Factors come in the order of the product: `left` codes Z and `right` C for
    rows, `left` C and `right` Z for columns.

    Parameters
    ----------
    rank : int
        At least 1 and at most the smaller side of the matrix.
    left, right : Codec
        How the two factors are stored.
    axis : str
        `"rows"` or `"columns"`.
    """

    rank: int
    left: Codec
    right: Codec
    axis: str = "rows"

    id: ClassVar[str] = "interpolative"
    grammar: ClassVar[str] = r"id(?P<rank>\d+)(?P<axis>c?)\("
    examples: ClassVar[tuple[str, ...]] = ("id3(fp32;fp32)", "id8c(bf16;lm4)", "id1(lm3;rot,lm3)", "id2c(tab3;mm8)")
    own_traits: ClassVar[Traits] = Traits(spectral=True)

    def __post_init__(self) -> None:
        if not (isinstance(self.left, Codec) and isinstance(self.right, Codec)):
            raise CodecConfigError(f"interpolative: left and right must be codecs, found {self.left!r}, {self.right!r}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise CodecConfigError(f"interpolative: rank must be an integer of at least 1, found {self.rank!r}")
        if self.axis not in AXES:
            raise CodecConfigError(f"interpolative: axis must be one of {AXES}, found {self.axis!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return `chosen`, a bit a row (column), and the factors' layouts; no coefficients where all are chosen."""
        shapes = self._shapes(shape)
        chosen = TensorSpec((shape[0 if self.axis == "rows" else 1],), levels=2, ones=self.rank)
        factors = {name: nest(name, codec.layout(shapes[name])) for name, codec in self.children().items()
                   if 0 not in shapes[name]}
        return {"chosen": chosen, **{key: spec for one in factors.values() for key, spec in one.items()}}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train each codec that has shared tables on the factors of the samples."""
        tables: dict[str, Tensor] = {}
        wanted = [name for name, codec in self.children().items() if codec.train is not Codec.train]
        kept = [self._split(sample, None) for sample in samples] if wanted else []
        for name in wanted:
            factors = [parts[name] for _, parts in kept if 0 not in parts[name].shape]
            if factors:
                tables.update(nest_tensors(name, self.children()[name].train(factors, seed=seed)))
        return tables

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Truncate the matrix to the rank, under the Hessian if there is one, and take it apart."""
        self.layout(shape_of(matrix))
        chosen, parts = self._split(matrix, how.hessian)
        plain = dataclasses.replace(how, hessian=None)
        encoded = {name: codec.search(parts[name], plain.inner(name)) for name, codec in self.children().items()
                   if 0 not in parts[name].shape}
        return self.join(shape_of(matrix), chosen, encoded)

    def join(self, shape: Shape, chosen: Tensor, parts: Mapping[str, Encoded]) -> Encoded:
        """Return the encoded matrix of the chosen rows (columns), int64 (rank,), rising, and the encoded factors.

        Parameters
        ----------
        parts : mapping of str to Encoded
            `left` and `right`; without the coefficients where all are chosen.
        """
        marks = torch.zeros(shape[0 if self.axis == "rows" else 1], dtype=torch.uint8, device=chosen.device)
        marks[chosen] = 1
        tensors = {key: t for name in self.children() if name in parts
                   for key, t in nest_tensors(name, parts[name].tensors).items()}
        return Encoded(self, shape, {"chosen": pack(marks, 2), **tensors})

    def decode(self, encoded: Encoded) -> Tensor:
        """Put the matrix together by blocks of rows; C, and Z for columns, are decoded once."""
        right = self._right(encoded)
        out = torch.empty(encoded.shape, dtype=torch.float32, device=right.device)
        for block in row_blocks(encoded.shape):
            out[block] = self._rows(encoded, block, right)
        return out

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return rows: those of C, or combinations of them."""
        return self._rows(encoded, rows, self._right(encoded))

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Return `x @ W.T` in r (out + in - r) multiplications a vector: the identity costs none."""
        chosen, others = self._sides(encoded)
        wide = x.to(torch.float32)
        left, right = (self._part(encoded, name) for name in ("left", "right"))
        if self.axis == "columns":
            inner = wide[..., chosen]
            if right is not None:
                inner = inner + self.right.matmul(right, wide[..., others])
            assert left is not None
            return self.left.matmul(left, inner).to(x.dtype)
        assert right is not None
        inner = self.right.matmul(right, wide)
        out = torch.empty(*x.shape[:-1], encoded.shape[0], dtype=torch.float32, device=x.device)
        out[..., chosen] = inner
        if left is not None:
            out[..., others] = self.left.matmul(left, inner)
        return out.to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Return `y @ W`, in as many multiplications."""
        chosen, others = self._sides(encoded)
        wide = y.to(torch.float32)
        left, right = (self._part(encoded, name) for name in ("left", "right"))
        if self.axis == "rows":
            assert right is not None
            inner = wide[..., chosen]
            if left is not None:
                inner = inner + self.left.matmul_transposed(left, wide[..., others])
            return self.right.matmul_transposed(right, inner).to(y.dtype)
        assert left is not None
        inner = self.left.matmul_transposed(left, wide)
        out = torch.empty(*y.shape[:-1], encoded.shape[1], dtype=torch.float32, device=y.device)
        out[..., chosen] = inner
        if right is not None:
            out[..., others] = self.right.matmul_transposed(right, inner)
        return out.to(y.dtype)

    def spec(self) -> str:
        """Return for example `id24(bf16;bf16)`, or `id24c(bf16;bf16)` for columns."""
        return f"id{self.rank}{'c' if self.axis == 'columns' else ''}({self.left.spec()};{self.right.spec()})"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `idN(a;b)`; `idN(a)` is `idN(a;a)`."""
        if len(parts) not in (1, 2):
            raise CodecConfigError(f"interpolative: needs one or two codecs, found {len(parts)}")
        return cls(int(match["rank"]), parts[0], parts[-1], AXES[bool(match["axis"])])

    def _shapes(self, shape: Shape) -> dict[str, Shape]:
        """Return the shapes of the factors of a matrix of `shape`; a side of 0 where all rows (columns) are chosen."""
        out, width = shape
        if self.rank > min(shape):
            raise CodecConfigError(f"interpolative: rank {self.rank} is above {min(shape)}, the largest that a matrix "
                                   f"of {out} rows and width {width} can have")
        if self.axis == "rows":
            return {"left": (out - self.rank, self.rank), "right": (self.rank, width)}
        return {"left": (out, self.rank), "right": (self.rank, width - self.rank)}

    def _split(self, matrix: Tensor, hessian: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the chosen rows (columns) and the factors, float32, of the matrix truncated to the rank."""
        peak = float(matrix.abs().max())
        scale = peak if peak > 0 else 1.0
        wide = matrix.to(torch.float64) / scale
        left, right = truncate(wide, self.rank, hessian)
        chosen, parts = take_apart(left, right, self.axis)
        for part in parts.values():  # what rounding leaves of zeros is no row, nor a column, for a codec to scale up
            part[part.abs() < NOISE * (part.abs().amax() if part.numel() else 0.0)] = 0.0
        factor = "right" if self.axis == "rows" else "left"
        parts[factor] = parts[factor] * scale
        return chosen, {name: part.to(torch.float32) for name, part in parts.items()}

    def _part(self, encoded: Encoded, name: str) -> Encoded | None:
        shape = self._shapes(encoded.shape)[name]
        return None if 0 in shape else encoded.child(name, self.children()[name], shape)

    def _sides(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return the chosen rows (columns), int64 (rank,), and the others; whatever the bits say, `rank` are chosen."""
        count = encoded.shape[0 if self.axis == "rows" else 1]
        marks = unpack(encoded.tensors["chosen"], 2, 0, count)
        order = torch.sort(marks, descending=True, stable=True).indices
        return order[: self.rank], order[self.rank :]

    def _right(self, encoded: Encoded) -> Tensor:
        """Return the right factor as a dense matrix: C (rank, in) for rows, `[I Z] Pᵀ` (rank, in) for columns."""
        right = self._part(encoded, "right")
        if self.axis == "rows":
            assert right is not None
            return right.decode()
        chosen, others = self._sides(encoded)
        out = torch.zeros(self.rank, encoded.shape[1], dtype=torch.float32, device=chosen.device)
        out[torch.arange(self.rank, device=chosen.device), chosen] = 1.0
        if right is not None:
            out[:, others] = right.decode()
        return out

    def _rows(self, encoded: Encoded, rows: Rows, right: Tensor) -> Tensor:
        left = self._part(encoded, "left")
        if self.axis == "columns":
            assert left is not None
            return self.left.decode_rows(left, rows) @ right
        chosen, others = self._sides(encoded)
        place = torch.empty(encoded.shape[0], dtype=torch.int64, device=right.device)
        place[chosen] = torch.arange(self.rank, device=right.device)
        place[others] = torch.arange(self.rank, encoded.shape[0], device=right.device)
        wanted = place[rows]
        out = right[wanted.clamp_max(self.rank - 1)]
        rest = wanted >= self.rank
        if left is not None and bool(rest.any()):
            out[rest] = self.left.decode_rows(left, wanted[rest] - self.rank) @ right
        return out


def truncate(matrix: Tensor, rank: int, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return L (out, rank), orthonormal columns, and R (in, rank), float64: the best `L Rᵀ`, under a Hessian if given.

    L spans the leading left singular vectors of `W H^½`, and `R = Wᵀ L`: no inverse.
    """
    weighed = matrix
    if hessian is not None and float(hessian.diagonal().mean()) > 0:
        values, vectors = torch.linalg.eigh(hessian.to(torch.float64))
        weighed = matrix @ (vectors * values.clamp_min(0.0).sqrt())
    left = torch.linalg.svd(weighed, full_matrices=False).U[:, :rank]
    return left, matrix.T @ left


def take_apart(left: Tensor, right: Tensor, axis: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the chosen rows (columns) of `L Rᵀ` and the factors of its gauge-fixed form, float64.

    Parameters
    ----------
    left, right : Tensor
        (out, rank) and (in, rank).
    """
    if axis == "rows":
        chosen, coefficients = interpolate(left)
        return chosen, {"left": coefficients, "right": left[chosen] @ right.T}
    chosen, coefficients = interpolate(right)
    return chosen, {"left": left @ right[chosen].T, "right": coefficients.T.contiguous()}
