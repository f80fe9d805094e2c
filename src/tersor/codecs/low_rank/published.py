"""Published factorizations into two quantized factors: LPLR, LSVD and DSVD.

Saha, Srivastava, Pilanci, "Matrix Compression via Randomized Low Rank and Low Precision Factorization", NeurIPS 2023
(arXiv 2310.11028). `A ≈ L Rᵀ` with L (out, rank) and R (in, rank), each stored by a codec of its own. The matrix is
read by blocks of rows only, so it may lie in a file larger than memory; the exact singular values of LSVD and DSVD need
it whole. Hessians are ignored, as published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tersor.contract.checks import check_matrix
from tersor.contract.codec import Codec, Encoded, Search
from tersor.errors import CodecConfigError
from tersor.payload.blocks import Shape, row_blocks, shape_of

OPTIONS = frozenset({"sketch", "nonzeros", "power_iterations", "orthonormalize"})
SKETCHES = ("gaussian", "sparse")
NONZEROS = 8  # default of a row of a sparse sketch
SKETCH, LEFT, RIGHT = range(3)  # who draws random numbers: each has a generator of its own
FLOAT32_EXPONENTS = 60  # powers of two by which float32 numbers are scaled in float32; beyond, in float64

Factors = tuple[Encoded, Encoded]


class Factored(Protocol):
    """What an encoder needs to know of `LowRank`: how many components, and the codecs of the factors."""

    @property
    def rank(self) -> int:
        """Components."""
        ...

    @property
    def left(self) -> Codec:
        """Codec of L, (out, rank)."""
        ...

    @property
    def right(self) -> Codec:
        """Codec of R, (in, rank)."""
        ...


@dataclasses.dataclass(frozen=True)
class Sketching:
    """Options of the random sketch.

    Parameters
    ----------
    sketch : str
        `"gaussian"`: independent normal numbers of variance 1 / rank; `"sparse"`: `nonzeros` entries ±1/√nonzeros in
        each row, at random distinct places (sparse Johnson-Lindenstrauss).
    nonzeros : int
        At most the rank are used.
    power_iterations : int
        How often `Y = A S` is replaced by `A (Aᵀ Y)`.
    orthonormalize : bool
        Before each product of a power iteration; False as in the released code, where Y collapses onto the leading
        direction after a few.
    """

    sketch: str = "gaussian"
    nonzeros: int = NONZEROS
    power_iterations: int = 0
    orthonormalize: bool = True

    def __post_init__(self) -> None:
        if self.sketch not in SKETCHES:
            raise CodecConfigError(f"low_rank: option sketch must be one of {list(SKETCHES)}, found {self.sketch!r}")
        if not isinstance(self.orthonormalize, bool):
            raise CodecConfigError("low_rank: option orthonormalize must be true or false, found "
                                   f"{self.orthonormalize!r}")
        for name, least in (("nonzeros", 1), ("power_iterations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CodecConfigError(f"low_rank: option {name} must be an integer >= {least}, found {value!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sketching:
        """Pick the sketch's options out of an encoder's."""
        return cls(**{name: options[name] for name in OPTIONS & set(options)})

    def draw(self, width: int, rank: int, generator: torch.Generator) -> Tensor:
        """Return a sketch, float64 (width, rank), on the processor: the same for every device."""
        if self.sketch == "gaussian":
            return torch.randn(width, rank, generator=generator, dtype=torch.float64) / math.sqrt(rank)
        count = min(self.nonzeros, rank)
        places = torch.rand(width, rank, generator=generator, dtype=torch.float64).topk(count, dim=1).indices
        signs = torch.randint(2, (width, count), generator=generator, dtype=torch.int64) * 2 - 1
        sketch = torch.zeros(width, rank, dtype=torch.float64)
        return sketch.scatter_(1, places, signs.to(torch.float64) / math.sqrt(count))


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A matrix over `2**exponent`, which makes its largest magnitude at least 1/2 and below 1, read by blocks of rows.

    Products are computed in float64 for a float64 matrix and in float32 otherwise; nothing overflows or vanishes.

    Parameters
    ----------
    matrix : Tensor
        (out, in), any float dtype and device; perhaps backed by a file.
    exponent : int
    """

    matrix: Tensor
    exponent: int

    @classmethod
    def of(cls, matrix: Tensor) -> Operator:
        """Return the operator of a finite matrix; the zero matrix gets exponent 0."""
        return cls(matrix, math.frexp(max(float(matrix.max()), -float(matrix.min())))[1])

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return shape_of(self.matrix)

    @property
    def dtype(self) -> torch.dtype:
        """Of products: float64 for a float64 matrix, else float32."""
        return torch.float64 if self.matrix.dtype == torch.float64 else torch.float32

    def rows(self, block: slice) -> Tensor:
        """Return scaled rows, `dtype` (k, in)."""
        inside = self.dtype if abs(self.exponent) <= FLOAT32_EXPONENTS else torch.float64
        return (self.matrix[block].to(inside) * 2.0**-self.exponent).to(self.dtype)

    def times(self, x: Tensor) -> Tensor:
        """Return `A x`, `dtype` (out, k), for x (in, k)."""
        x = x.to(device=self.matrix.device, dtype=self.dtype)
        return torch.cat([self.rows(block) @ x for block in row_blocks(self.shape)])

    def transposed_times(self, y: Tensor) -> Tensor:
        """Return `Aᵀ y`, `dtype` (in, k), for y (out, k)."""
        y = y.to(device=self.matrix.device, dtype=self.dtype)
        total = torch.zeros(self.shape[1], y.shape[1], dtype=self.dtype, device=self.matrix.device)
        for block in row_blocks(self.shape):
            total.addmm_(self.rows(block).T, y[block])
        return total

    def svd(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading singular vectors and values: (out, rank), (rank,), (in, rank); dense, O(out in²)."""
        whole = torch.cat([self.rows(block) for block in row_blocks(self.shape)])
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].T


def generator_of(seed: int, user: int) -> torch.Generator:
    """Return a generator for one of `SKETCH`, `LEFT` and `RIGHT`; different users draw different numbers."""
    return torch.Generator().manual_seed(_seed_of(seed, user))


def _seed_of(seed: int, user: int) -> int:
    return (4 * seed + user) % 2**63


def basis(operator: Operator, rank: int, settings: Sketching, generator: torch.Generator,
          sketch: Tensor | None = None) -> Tensor:
    """Return `A S`, after power iterations if asked for: (out, rank), its columns spanning most of A's.

    Orthonormalized columns are turned by a square Gaussian sketch in the end, as LSVD does: it equalizes their ranges.

    Parameters
    ----------
    operator : Operator
    rank : int
    settings : Sketching
    generator : torch.Generator
    sketch : Tensor or None
        (in, rank) in place of a drawn one, to reproduce published figures.
    """
    start = settings.draw(operator.shape[1], rank, generator) if sketch is None else sketch
    found = operator.times(start)
    for _ in range(settings.power_iterations):
        found = operator.times(_tamed(operator.transposed_times(_tamed(found, settings)), settings))
    if settings.power_iterations and settings.orthonormalize:
        found = found @ _square(rank, generator).to(found)
    return found


def _tamed(y: Tensor, settings: Sketching) -> Tensor:
    """Return an orthonormal basis of the columns, or only scaled by a power of two."""
    if settings.orthonormalize:
        return torch.linalg.qr(y).Q
    return y * 2.0 ** -math.frexp(float(y.abs().max()))[1]


def _square(rank: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rank, rank, generator=generator, dtype=torch.float64) / math.sqrt(rank)


def resolve(operator: Operator, left: Tensor) -> Tensor:
    """Return the W (in, rank) of least norm that minimizes `‖left Wᵀ - A‖`: `Aᵀ` times the transposed pseudo-inverse.

    Directions of `left` (out, rank) below float32 rounding of the largest are left out.
    """
    unit, corner = torch.linalg.qr(left.to(torch.float64))
    u, values, v = torch.linalg.svd(corner)
    least = float(values[0]) * max(left.shape) * torch.finfo(torch.float32).eps
    inverse = torch.where(values > least, 1.0 / values, torch.zeros_like(values))
    return operator.transposed_times(unit @ ((u * inverse) @ v))


def encode_factor(codec: Codec, factor: Tensor, exponent: int, how: Search) -> tuple[Encoded, Tensor]:
    """Encode `2**exponent factor`; return it and what it decodes to, over `2**exponent` and in the factor's dtype."""
    scaled = (factor.to(torch.float64) * 2.0**exponent).to(factor.dtype).contiguous()
    check_matrix(scaled, "factor")
    encoded = codec.search(scaled, how)
    return encoded, (encoded.decode().to(torch.float64) * 2.0**-exponent).to(factor.dtype)


def exponents(operator: Operator) -> tuple[int, int]:
    """Return by which powers of two the left and the right factor are multiplied to undo the operator's scaling."""
    return operator.exponent // 2, operator.exponent - operator.exponent // 2


def inner_searches(how: Search) -> tuple[Search, Search]:
    """Return the searches of the left and right codec: their tables, no Hessian, and seeds of their own."""
    return (dataclasses.replace(how.inner("left"), hessian=None, seed=_seed_of(how.seed, LEFT)),
            dataclasses.replace(how.inner("right"), hessian=None, seed=_seed_of(how.seed, RIGHT)))


def lplr(codec: Factored, matrix: Tensor, how: Search, *, sketch: Tensor | None = None) -> Factors:
    """Encode as published: `L = Q(A S)`, `W = argmin ‖L Wᵀ - A‖`, `R = Q'(W)`; O(out in rank).

    Parameters
    ----------
    codec : LowRank
    matrix : Tensor
        (out, in), finite.
    how : Search
        Its options are those of `Sketching` and of the factors' codecs.
    sketch : Tensor or None
        (in, rank) in place of a drawn one.
    """
    operator = Operator.of(matrix)
    found = basis(operator, codec.rank, Sketching.of(how.options), generator_of(how.seed, SKETCH), sketch)
    return _resolved(codec, operator, found, how)


def lsvd(codec: Factored, matrix: Tensor, how: Search, *, sketch: Tensor | None = None) -> Factors:
    """Encode as published ("LPLR-SVD"): `L = Q(U Σ S)` of the exact leading singular vectors; R as in `lplr`.

    Parameters are those of `lplr`, but `sketch` S is (rank, rank).
    """
    operator = Operator.of(matrix)
    vectors, values, _ = operator.svd(codec.rank)
    turn = _square(codec.rank, generator_of(how.seed, SKETCH)) if sketch is None else sketch
    return _resolved(codec, operator, (vectors * values) @ turn.to(vectors), how)


def dsvd(codec: Factored, matrix: Tensor, how: Search) -> Factors:
    """Encode as published ("direct SVD"): `L = Q(U)`, `R = Q'(V Σ)`, each on its own."""
    operator = Operator.of(matrix)
    vectors, values, others = operator.svd(codec.rank)
    searches, powers = inner_searches(how), exponents(operator)
    left, _ = encode_factor(codec.left, vectors, powers[0], searches[0])
    right, _ = encode_factor(codec.right, others * values, powers[1], searches[1])
    return left, right


def _resolved(codec: Factored, operator: Operator, found: Tensor, how: Search) -> Factors:
    searches, powers = inner_searches(how), exponents(operator)
    left, decoded = encode_factor(codec.left, found, powers[0], searches[0])
    right, _ = encode_factor(codec.right, resolve(operator, decoded), powers[1], searches[1])
    return left, right
