"""Low rank, low precision: the product of two thin factors, each stored by a codec of its own.

LPLR (Saha, Srivastava, Pilanci 2023) and what came after it; see docs/codecs/low_rank.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.low_rank import alternating, published
from tersor.codecs.low_rank.published import Factors
from tersor.codecs.scalar.dense import Dense
from tersor.contract.codec import Codec, Encoded, Search, Traits
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.ops.low_rank_linear import low_rank_linear
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout

DEFAULT_METHOD = "alternating"


@final
@dataclasses.dataclass(frozen=True)
class LowRank(Codec):
    """`W = L Rᵀ`, L (out, rank) and R (in, rank): components are columns of both.

    Parameters
    ----------
    rank : int
        At least 1 and at most the smaller side of the matrix.
    left, right : Codec
        How L and R are stored. Scales along outputs (`lm4o`) are one a component.

    Encoder options
    ---------------
    method : str
        `"alternating"` (default; `tersor.codecs.low_rank.alternating`), or as published `"lplr"`, `"lsvd"`, `"dsvd"`.
    sketch, nonzeros, power_iterations, orthonormalize
        Of the published methods; see `tersor.codecs.low_rank.published.Sketching`.
    rounds, power_iterations, oversample, fast
        Of `"alternating"`; see `tersor.codecs.low_rank.alternating.AlternatingOptions`.
    """

    rank: int
    left: Codec
    right: Codec

    id: ClassVar[str] = "low_rank"
    grammar: ClassVar[str] = r"lr(?P<rank>\d+)\("
    examples: ClassVar[tuple[str, ...]] = ("lr3(al40;al37)", "lr3(lm4o;lm4o)", "lr8(mm8;mm8)", "lr1(fp32;fp32)",
                                           "lr2(rot,lm3;tab3)")
    own_traits: ClassVar[Traits] = Traits(spectral=True)
    own_options: ClassVar[frozenset[str]] = published.OPTIONS | alternating.OPTIONS | {"method"}

    def __post_init__(self) -> None:
        if not (isinstance(self.left, Codec) and isinstance(self.right, Codec)):
            raise CodecConfigError(f"low_rank: left and right must be codecs, found {self.left!r} and {self.right!r}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise CodecConfigError(f"low_rank: rank must be an integer of at least 1, found {self.rank!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return the layouts of L under `left/` and of R under `right/`."""
        shapes = self._shapes(shape)
        return {**nest("left", self.left.layout(shapes[0])), **nest("right", self.right.layout(shapes[1]))}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train each codec that has shared tables on the unquantized factors of LPLR."""
        tables: dict[str, Tensor] = {}
        kept = list(samples)
        for name, codec in self.children().items():
            side = 0 if name == "left" else 1
            trained = [s for s in kept if _is_trained(codec, self._shapes(shape_of(s))[side])]
            if trained:
                factors = [self._unquantized(sample, seed)[side] for sample in trained]
                tables.update(nest_tensors(name, codec.train(factors, seed=seed)))
        return tables

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Encode with the method that the options name."""
        shape = shape_of(matrix)
        self.layout(shape)
        method = how.options.get("method", DEFAULT_METHOD)
        if method not in METHODS:
            raise CodecConfigError(f"low_rank: option method must be one of {sorted(METHODS)}, found {method!r}")
        return self.join(*METHODS[method](self, matrix, how))

    def join(self, left: Encoded, right: Encoded) -> Encoded:
        """Return the encoded matrix of two encoded factors, (out, rank) and (in, rank)."""
        shape = left.shape[0], right.shape[0]
        return Encoded(self, shape, {**nest_tensors("left", left.tensors), **nest_tensors("right", right.tensors)})

    def decode(self, encoded: Encoded) -> Tensor:
        """Multiply the factors by blocks of rows; R is decoded once."""
        left, right = self.factors(encoded)
        other = right.decode().T
        out = torch.empty(encoded.shape, dtype=torch.float32, device=other.device)
        for block in row_blocks(encoded.shape):
            out[block] = self.left.decode_rows(left, block) @ other
        return out

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return rows of L times Rᵀ."""
        left, right = self.factors(encoded)
        return self.left.decode_rows(left, rows) @ right.decode().T

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Return `(x R) Lᵀ`: O((out + in) rank) a vector, one block of R or L dense at a time, never the product."""
        left, right = self.factors(encoded)
        if isinstance(self.left, Dense) and isinstance(self.right, Dense) and "fp8" not in (self.left.dtype,
                                                                                            self.right.dtype):
            return low_rank_linear(x, left.tensors["values"], right.tensors["values"])
        wide = x.to(torch.float32)
        inner = torch.zeros(*x.shape[:-1], self.rank, dtype=torch.float32, device=x.device)
        for block in row_blocks(right.shape):
            inner += wide[..., block] @ self.right.decode_rows(right, block)
        return self.left.matmul(left, inner).to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Return `(y L) Rᵀ`."""
        left, right = self.factors(encoded)
        inner = self.left.matmul_transposed(left, y.to(torch.float32))
        return self.right.matmul(right, inner).to(y.dtype)

    def factors(self, encoded: Encoded) -> Factors:
        """Return the encoded L, (out, rank), and R, (in, rank)."""
        shapes = self._shapes(encoded.shape)
        return encoded.child("left", self.left, shapes[0]), encoded.child("right", self.right, shapes[1])

    def spec(self) -> str:
        """Return for example `lr64(lm4o;lm4o)`."""
        return f"lr{self.rank}({self.left.spec()};{self.right.spec()})"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `lrN(a;b)`; `lrN(a)` is `lrN(a;a)`."""
        if len(parts) not in (1, 2):
            raise CodecConfigError(f"low_rank: needs one or two codecs, found {len(parts)}")
        return cls(int(match["rank"]), parts[0], parts[-1])

    def _shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """Return the shapes of the factors of a matrix of `shape`."""
        if self.rank > min(shape):
            raise CodecConfigError(f"low_rank: rank {self.rank} is above {min(shape)}, the largest that a matrix of "
                                   f"{shape[0]} rows and width {shape[1]} can have")
        return (shape[0], self.rank), (shape[1], self.rank)

    def _unquantized(self, matrix: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the factors of LPLR before quantization, float32 or float64."""
        operator = published.Operator.of(matrix)
        generator = published.generator_of(seed, published.SKETCH)
        left = published.basis(operator, self.rank, published.Sketching(), generator)
        return left, published.resolve(operator, left)


def rank_for(shape: Shape, rate: float, left_bits: float, right_bits: float) -> int:
    """Return the rank of the published rule: `⌊rate n d / (n left_bits + d right_bits)⌋` for a matrix (n, d).

    Scales and ranges are not charged; 0 where not even one component fits, and perhaps more than min(n, d).

    Raises
    ------
    CodecConfigError
        If rate or bits are not positive, or the shape is empty.
    """
    if min(shape) < 1:
        raise CodecConfigError(f"low_rank: there is no rank for the empty shape {tuple(shape)}")
    for name, value in (("rate", rate), ("left_bits", left_bits), ("right_bits", right_bits)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise CodecConfigError(f"low_rank: {name} must be a positive number, found {value!r}")
    return math.floor(rate * shape[0] * shape[1] / (shape[0] * left_bits + shape[1] * right_bits))


def _is_trained(codec: Codec, shape: Shape) -> bool:
    return any(spec.shared for spec in codec.layout(shape).values())


METHODS: Mapping[str, Callable[[LowRank, Tensor, Search], Factors]] = MappingProxyType({
    "alternating": alternating.alternate, "lplr": published.lplr, "lsvd": published.lsvd, "dsvd": published.dsvd})
