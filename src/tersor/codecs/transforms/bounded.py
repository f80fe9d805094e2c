"""The length of each row's error, in a byte: how far the original may lie from what is decoded.

RaBitQ (Gao, Long; SIGMOD 2024, arXiv 2405.12497) keeps such a number a vector, too, and derives from it a bound that
holds with some probability. Here the length itself is kept, rounded up, so that bounds hold for certain.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.coordinates import Coordinates
from tersor.contract.nesting import nest_tensors
from tersor.contract.wrapper import Wrapped
from tersor.errors import CodecConfigError
from tersor.numerics.kmeans import exponent_of, times_power
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec

STEPS = 16  # lengths an octave: one is at most 4.4 % too long
MIDDLE, NONE = 128, 255  # the code of the unit, and of what is longer than all others: no bound
DRAWN = 1024  # rows whose median error is the unit
SLACK = 2.0**-21  # of a row's own length: what float32 may round
LEAST = 2.0**-100  # the least unit


@final
@dataclasses.dataclass(frozen=True)
class Bounded(Wrapped):
    """`W = inner`, and of every row a length that its error does not exceed."""

    id: ClassVar[str] = "bounded"
    grammar: ClassVar[str] = r"err,"
    examples: ClassVar[tuple[str, ...]] = ("err,lm3", "err,ctr8,rot,tr2x8")

    def own(self, shape: Shape) -> Layout:
        """Return `errors`, a byte a row, and the shared `error_unit`."""
        return {"errors": TensorSpec((shape[0],)), "error_unit": TensorSpec((1,), torch.float32, shared=True)}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train the inner codec; the unit is the median error of rows drawn from the samples."""
        kept = [sample.to(torch.float32) for sample in samples]
        if not kept or len({sample.shape[1] for sample in kept}) != 1:
            raise CodecConfigError(f"codec '{self.spec()}': a unit of errors needs sample matrices of one width, found "
                                   f"widths {sorted({sample.shape[1] for sample in kept})}")
        tables = self.inner.train(kept, seed=seed)
        rows = torch.cat([sample[:: max(1, len(sample) * len(kept) // DRAWN)] for sample in kept])
        usual = errors_of(rows, self.inner.search(rows, Search(seed=seed, tables=tables))).median()
        return {"error_unit": usual.clamp_min(LEAST).reshape(1).to(torch.float32), **nest_tensors("inner", tables)}

    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the matrix as it is, and the unit."""
        if "error_unit" not in how.tables:
            raise CodecConfigError(f"codec '{self.spec()}' needs its shared unit: tables=codec.train(samples)")
        return matrix, {"error_unit": how.tables["error_unit"].to(matrix.device)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Encode, then measure every row's error."""
        shape = shape_of(matrix)
        self.layout(shape)
        changed, own = self.change(matrix, how)
        inner = self.inner.search(changed, self.carry(how, own))
        return self.close({**own, "errors": coded(errors_of(matrix, inner), own["error_unit"])}, inner)

    def _check_small(self, matrix: Tensor, encoded: Encoded, how: Search) -> None:
        """Compare what the inner codec makes of it: a byte too long or too short changes no number."""
        inner = how.inner("inner")
        self.inner._check_small(matrix, self.child(encoded), inner)

    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the rows as they are."""
        del encoded, rows
        return inner

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Multiply by the inner matrix."""
        return self.inner.matmul(self.child(encoded), x)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Multiply by the transposed inner matrix."""
        return self.inner.matmul_transposed(self.child(encoded), y)

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the inner codec's."""
        return self.inner.coordinates(self.child(encoded))

    def bounds(self, encoded: Encoded) -> Tensor:
        """Return the lengths that errors do not exceed, float32 (out,); infinity where there is no bound."""
        return known(encoded.tensors["error_unit"])[encoded.tensors["errors"].to(torch.int64)]

    def spec(self) -> str:
        """Return for example `err,ctr8,rot,tr2`."""
        return f"err,{self.inner.spec()}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `err` strings; see `spec`."""
        del match
        return cls(parts[0])


def errors_of(matrix: Tensor, encoded: Encoded) -> Tensor:
    """Return what the length of every row's error cannot exceed, float64 (out,): rounding of float32 is added."""
    found = []
    for block in row_blocks(encoded.shape):
        decoded, wanted = encoded.codec.decode_rows(encoded, block), matrix[block]
        power = -max(exponent_of(decoded), exponent_of(wanted))
        near, far = (times_power(one.to(torch.float64), power) for one in (decoded, wanted))
        found.append(torch.ldexp((near - far).norm(dim=1) + SLACK * far.norm(dim=1),
                                 torch.tensor(-power, dtype=torch.float64)))
    return torch.cat(found)


def coded(lengths: Tensor, unit: Tensor) -> Tensor:
    """Return the bytes of lengths, rounded up, uint8: 0 for none."""
    steps = (STEPS * (lengths / unit.to(torch.float64)).clamp_min(torch.finfo(torch.float64).tiny).log2()).ceil()
    return torch.where(lengths > 0, (steps + MIDDLE).clamp(1, NONE), 0).to(torch.uint8)


def known(unit: Tensor) -> Tensor:
    """Return the lengths that bytes stand for, float32 (256,): rounded up, the last one infinity."""
    codes = torch.arange(256, dtype=torch.float64, device=unit.device)
    lengths = unit.to(torch.float64) * torch.exp2((codes - MIDDLE) / STEPS) * (1 + 2.0**-20)
    lengths[0], lengths[NONE] = 0.0, torch.inf
    return lengths.to(torch.float32)
