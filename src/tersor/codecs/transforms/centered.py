"""What vectors have in common, taken away: a mean that all share, and, if wanted, the scale of a row in a byte.

RaBitQ (Gao, Long; SIGMOD 2024, arXiv 2405.12497) codes vectors around their mean, too; without that, a mean that all
vectors share takes most of a code's bits and says nothing about which vectors are near.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.coordinates import Coded, Coordinates
from tersor.contract.nesting import nest_tensors
from tersor.contract.wrapper import Wrapped
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.numerics.kmeans import exponent_of, times_power
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import rms

SCALES = "scales"
FINE, COARSE = 32, 4  # scales an octave: within 2**3 units of the usual, and beyond, to 2**11 units
NEAR = 3  # octaves on either side: a length is near its scale by a half of a hundredth, the square root of the noise's
SPREAD = 10  # most octaves that the unit lies under the longest row that it was trained on
EXPONENTS = (-118, 112)  # of the unit: scales of rows within 2**8 of the usual are normal bf16


@final
@dataclasses.dataclass(frozen=True)
class Centered(Wrapped):
    """`W = 1 meanᵀ + inner`, with a mean trained on samples and stored once for all matrices of a width.

    Parameters
    ----------
    inner : Codec
    lengths : bool
        The inner codec's scales, one a row in bf16, are stored as bytes: in steps of 2 % around a unit that is trained
        with the mean, of a fifth far from it. They are fitted to what the row decodes to by least squares.
    """

    lengths: bool = False

    id: ClassVar[str] = "centered"
    grammar: ClassVar[str] = r"ctr(?P<lengths>8)?,"
    examples: ClassVar[tuple[str, ...]] = ("ctr,lm3", "ctr8,rot,tr2x8", "ctr8,sym16")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lengths, bool):
            raise CodecConfigError(f"centered: lengths must be true or false, found {self.lengths!r}")

    def own(self, shape: Shape) -> Layout:
        """Return the shared `mean`; with lengths also a byte a row, and the shared `unit`."""
        held = {"mean": TensorSpec((shape[1],), torch.float32, shared=True)}
        if self.lengths:
            held |= {"unit": TensorSpec((1,), torch.float32, shared=True), "lengths": TensorSpec((shape[0],))}
        return held

    def layout(self, shape: Shape) -> Layout:
        """Return `own` and the inner layout, without the scales where they are stored as bytes."""
        found = dict(super().layout(shape))
        if self.lengths:
            del found[f"inner/{self._scales(shape)}"]
        return found

    def _scales(self, shape: Shape) -> str:
        """Return the name of the inner codec's scales."""
        names = [name for name, spec in self.inner.layout(shape).items() if name.split("/")[-1] == SCALES
                 and spec.dtype == torch.bfloat16 and spec.numel == shape[0] and not spec.shared]
        if len(names) != 1:
            raise CodecConfigError(f"codec '{self.spec()}': lengths need a codec with one scale a row, which "
                                   f"'{self.inner}' is not; use 'ctr,{self.inner}'")
        return names[0]

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Return the samples' mean, the unit and the inner codec's tables, trained on what the mean leaves."""
        kept = list(samples)
        widths = {sample.shape[1] for sample in kept}
        if len(widths) != 1:
            raise CodecConfigError(f"codec '{self.spec()}': a mean needs sample matrices of one width, found widths "
                                   f"{sorted(widths)}")
        total = sum(_sum(sample) for sample in kept)
        assert isinstance(total, Tensor)
        mean = (total / sum(len(sample) for sample in kept)).to(torch.float32)
        less = [sample.to(torch.float32) - mean for sample in kept]
        tables: dict[str, Tensor] = {"mean": mean}
        if self.lengths:
            usual = _usual(less)
            if usual < EXPONENTS[0]:
                raise NonFiniteError(f"codec '{self.spec()}': rows are {2.0**usual:.2g} long, too short for scales in "
                                     "steps; scale the samples up")
            tables["unit"] = mean.new_full((1,), 2.0 ** min(usual, EXPONENTS[1]))
        return {**tables, **nest_tensors("inner", self.inner.train(less, seed=seed))}

    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Take the mean away."""
        own = {}
        for name in ("mean", "unit") if self.lengths else ("mean",):
            if name not in how.tables:
                raise CodecConfigError(f"codec '{self.spec()}' needs its shared mean: tables=codec.train(samples)")
            own[name] = how.tables[name].to(matrix.device)
        if own["mean"].shape[0] != matrix.shape[1]:
            raise CodecConfigError(f"codec '{self.spec()}': the mean was trained on a width of {own['mean'].shape[0]}, "
                                   f"the matrix has {matrix.shape[1]}")
        return matrix.to(torch.float32) - own["mean"], own

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Encode what the mean leaves; then fit the scales."""
        shape = shape_of(matrix)
        self.layout(shape)
        changed, own = self.change(matrix, how)
        inner = self.inner.search(changed, self.carry(how, own))
        if not self.lengths:
            return self.close(own, inner)
        name = self._scales(shape)
        fitted = inner.tensors[name].reshape(-1).to(torch.float32) * _gains(changed, inner)
        kept = {key: tensor for key, tensor in inner.tensors.items() if key != name}
        own = {**own, "lengths": self._coded(fitted, own["unit"])}
        return Encoded(self, shape, {**own, **nest_tensors("inner", kept)})

    def _check_small(self, matrix: Tensor, encoded: Encoded, how: Search) -> None:
        """Compare with the same matrix and the same tables, all in larger units."""
        power = -exponent_of(matrix)
        own = {name: times_power(how.tables[name], power) for name in ("mean", "unit") if name in how.tables}
        if "unit" in own:
            own["unit"] = own["unit"].clamp_max(2.0 ** EXPONENTS[1])
        super()._check_small(matrix, encoded, dataclasses.replace(how, tables={**how.tables, **own}))

    def _coded(self, scales: Tensor, unit: Tensor) -> Tensor:
        """Return the bytes of the nearest scales."""
        known = _known(unit)
        if scales.numel() and float(scales.max()) > float(known[-1]):
            raise NonFiniteError(f"codec '{self.spec()}': a row is {float(scales.max() / unit):.3g} times as long as "
                                 "those that the mean was trained on; train on such rows too, or use "
                                 f"'ctr,{self.inner}'")
        return torch.bucketize(scales, (known[1:] + known[:-1]) / 2).to(torch.uint8)

    def child(self, encoded: Encoded) -> Encoded:
        """Return the inner encoded matrix; its scales from their bytes."""
        inner = super().child(encoded)
        if not self.lengths:
            return inner
        held = encoded.tensors
        name = self._scales(encoded.shape)
        scales = _known(held["unit"])[held["lengths"].to(torch.int64)].to(torch.bfloat16)
        shape = self.inner.layout(encoded.shape)[name].shape
        return dataclasses.replace(inner, tensors={**inner.tensors, name: scales.reshape(shape)})

    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Give the mean back."""
        del rows
        return inner + encoded.tensors["mean"]

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Return the inner product, and the mean's, which all rows share."""
        wide = x.to(torch.float32)
        product = self.inner.matmul(self.child(encoded), wide)
        return (product + (wide @ encoded.tensors["mean"])[..., None]).to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Return the inner product, and the mean times the sum of the outputs."""
        wide = y.to(torch.float32)
        product = self.inner.matmul_transposed(self.child(encoded), wide)
        return (product + wide.sum(-1, keepdim=True) * encoded.tensors["mean"]).to(y.dtype)

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the inner codec's, with the mean as offset."""
        return _Offset(encoded, self.inner.coordinates(self.child(encoded)))

    def spec(self) -> str:
        """Return for example `ctr,lm3`, `ctr8,rot,tr2`."""
        return f"ctr{'8' if self.lengths else ''},{self.inner.spec()}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `ctr` strings; see `spec`."""
        return cls(parts[0], bool(match["lengths"]))


class _Offset(Coordinates):
    """The coordinates of the inner matrix, and the mean."""

    def __init__(self, encoded: Encoded, inner: Coordinates) -> None:
        super().__init__(encoded)
        self._inner = inner

    def rows(self, rows: Rows) -> Tensor:
        """Return the inner coordinates."""
        return self._inner.rows(rows)

    def coded(self) -> Coded | None:
        """Return the inner codes; scales that are bytes, with what these stand for."""
        inner, codec = self._inner.coded(), self.encoded.codec
        if inner is None:
            return None
        found = inner.under("inner")
        assert isinstance(codec, Centered)
        if not codec.lengths:
            return found
        return dataclasses.replace(found, scales="lengths", steps=_known(self.encoded.tensors["unit"]).to(
            torch.bfloat16).to(torch.float32), refits=None)

    def into(self, x: Tensor) -> Tensor:
        """Return what the inner ones need."""
        return self._inner.into(x)

    def out_of(self, y: Tensor) -> Tensor:
        """Return what the inner ones give."""
        return self._inner.out_of(y)

    def offset(self) -> Tensor:
        """Return the mean, and the inner offset."""
        inner, mean = self._inner.offset(), self.encoded.tensors["mean"]
        return mean if inner is None else inner + mean


def _sum(matrix: Tensor) -> Tensor:
    """Return the sum of all rows, float64 (in,)."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in row_blocks(shape_of(matrix)):
        total += matrix[block].to(torch.float64).sum(0)
    return total


def _gains(matrix: Tensor, inner: Encoded) -> Tensor:
    """Return what decoded rows must be multiplied by to err least, float32 (out,), at least 0."""
    found = []
    for block in row_blocks(inner.shape):
        decoded = inner.codec.decode_rows(inner, block)
        power = -exponent_of(decoded)
        unit, wanted = (times_power(one.to(torch.float64), power) for one in (decoded, matrix[block]))
        size = unit.square().sum(1)
        found.append(torch.where(size > 0, (unit * wanted).sum(1) / size.clamp_min(1e-300), 1.0).clamp_min(0.0))
    return torch.cat(found).to(torch.float32)


def _usual(samples: Sequence[Tensor]) -> int:
    """Return the exponent of the usual length of rows: the median's, or not far below the longest's."""
    lengths = torch.cat([rms(sample) for sample in samples])
    lengths = lengths[lengths > 0]
    return max(exponent_of(lengths.median()), exponent_of(lengths) - SPREAD) if len(lengths) else 0


@cache
def _steps() -> Tensor:
    """Return the scales in units, bf16 as float32 (256,): 0, then rising, in three geometric rows."""
    fine, coarse = 2 * NEAR * FINE, (256 - 2 * NEAR * FINE) // 2
    octaves = [*(-NEAR - (coarse - code) / COARSE for code in range(1, coarse)),
               *(code / FINE - NEAR for code in range(fine)), *(code / COARSE + NEAR for code in range(coarse))]
    return torch.tensor([0.0, *(2.0**octave for octave in octaves)]).to(torch.bfloat16).to(torch.float32)


def _known(unit: Tensor) -> Tensor:
    """Return the scales that bytes stand for, float32 (256,)."""
    return _steps().to(unit.device) * unit
