"""Reduced order models of a linear: factors of the least error on what it sees, and the error of every rank.

LLM-ROM (Chavan, Lele, Gupta, arXiv 2312.07046) projects outputs `y = W x` on the leading eigenvectors of their
covariance. With second moments *not* centred that is the optimum of `min ‖(W - W') X‖` at rank r (whitened SVD,
Eckart-Young on W X), and needs no inverse; centred it needs a bias. Derivations: docs/rom.md.

Everything here is per token: `G = E[x xᵀ]`, errors `E‖y - ŷ‖²`. Sums run in float32, factorizations in float64.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.errors import CodecConfigError, NonFiniteError
from tersor.numerics.settings import pinned

TARGETS = ("weights", "diagonal", "outputs", "anchored")
FLOOR = 1e-12  # eigenvalues below this share of the largest are rounding: their directions are not kept
DAMPING = 1e-3  # share of the mean diagonal added to a curvature before its root is taken


class Sums:
    """Streamed sums over tokens of the inputs x' of some linears, and of the inputs x they had originally.

    Parameters
    ----------
    width : int
    cross : bool
        Whether `E[x x'ᵀ]` is wanted; without it x is x'.
    """

    def __init__(self, width: int, *, cross: bool = False) -> None:
        self.count = 0
        self._second = torch.zeros(width, width)
        self._cross = torch.zeros(width, width) if cross else None
        self._means = torch.zeros(3, width, dtype=torch.float64)

    def add(self, x: Tensor, original: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add tokens (…, width), and the same tokens' original inputs; `mask` (…) is 0 on padding."""
        kept = slice(None) if mask is None else mask.reshape(-1).bool()
        rows = x.detach().reshape(-1, x.shape[-1])[kept].to(torch.float32)
        first = rows if original is None else original.detach().reshape(-1, x.shape[-1])[kept].to(torch.float32)
        self._second.addmm_(rows.T, rows)
        if self._cross is not None:
            self._cross.addmm_(first.T, rows)
        self._means[0] += rows.sum(0, dtype=torch.float64)
        self._means[1] += first.sum(0, dtype=torch.float64)
        self._means[2] += rows.abs().sum(0, dtype=torch.float64)
        self.count += rows.shape[0]

    def moments(self, name: str = "inputs") -> Moments:
        """Return the means over tokens.

        Raises
        ------
        NonFiniteError
            If they are not finite.
        """
        scale = 1.0 / max(1, self.count)
        second = self._second.to(torch.float64)
        cross = None if self._cross is None else self._cross.to(torch.float64) * scale
        mean, original, size = self._means * scale
        found = Moments((second + second.T) * (0.5 * scale), mean, size, self.count, cross, original)
        if not bool(torch.isfinite(second).all() & torch.isfinite(self._means).all()):
            raise NonFiniteError(f"calibration of '{name}': the activations hold NaN, infinity or huge values")
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Means over tokens, float64.

    Attributes
    ----------
    second : Tensor
        `E[x' x'ᵀ]`, (in, in).
    mean : Tensor
        `E[x']`, (in,).
    size : Tensor
        `E|x'|`, (in,).
    count : int
        Tokens.
    cross : Tensor or None
        `E[x x'ᵀ]` against the original inputs x, (in, in); None: they are x' themselves.
    original : Tensor or None
        `E[x]`, (in,).
    """

    second: Tensor
    mean: Tensor
    size: Tensor
    count: int
    cross: Tensor | None = None
    original: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, original: Tensor | None = None) -> Moments:
        """Return the moments of tokens (count, in), and of their original inputs, in float64 throughout."""
        wide = x.to(torch.float64)
        first = wide if original is None else original.to(torch.float64)
        cross = None if original is None else first.T @ wide / len(wide)
        return cls(wide.T @ wide / len(wide), wide.mean(0), wide.abs().mean(0), len(wide), cross, first.mean(0))


@dataclasses.dataclass(frozen=True)
class Target:
    """What a reduced linear is to be near to.

    Attributes
    ----------
    kind : str
        `"weights"`: W itself (plain SVD). `"diagonal"`: W scaled by `E|x|^exponent` a column (ASVD, arXiv 2312.05821).
        `"outputs"`: `W x'` (LLM-ROM; uncentred, SVD-LLM and Swift-SVD). `"anchored"`: the outputs `W x` of the original
        model, by reduced-rank regression on the inputs x' that the reduced one has.
    centred : bool
        Covariances about the mean, not second moments.
    bias : bool
        Add the best bias for the factors found. Centred without it is what LLM-ROM and SFSD released, and no optimum.
    ridge : float
        Anchored only: `λ ‖W' - W‖²` is added to the error, λ being so much of the mean diagonal of `E[x' x'ᵀ]`.
    exponent : float
    """

    kind: str = "outputs"
    centred: bool = False
    bias: bool = False
    ridge: float = 0.03
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise CodecConfigError(f"the target must be one of {TARGETS}, found {self.kind!r}")
        if not (self.ridge >= 0 and 0 <= self.exponent <= 2):
            raise CodecConfigError(f"ridge must be >= 0 and exponent in [0, 2], found {self.ridge}, {self.exponent}")


@dataclasses.dataclass(frozen=True, eq=False)
class Reduced:
    """All ranks of one reduced linear at once.

    Attributes
    ----------
    left : Tensor
        (out, k), float64; k is the numerical rank of the problem.
    right : Tensor
        (in, k), float64: W' of rank r is `left[:, :r] @ right[:, :r].T`.
    energies : Tensor
        (k,), falling: what each component takes off the squared error, under the curvature if there is one.
    full : Tensor
        (out, in): what rank k stands for; W, or the regression on x' where anchored.
    outputs : Tensor
        `E[y]`, (out,), of the target.
    inputs : Tensor
        `E[x']`, (in,).
    biased : bool
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    full: Tensor
    outputs: Tensor
    inputs: Tensor
    biased: bool

    @property
    def errors(self) -> Tensor:
        """Squared error a token of every rank from 0 to k, beyond what no rank avoids: float64 (k + 1,)."""
        tail = self.energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return (out, rank) and (in, rank); columns of zeros beyond k."""
        extra = max(0, rank - self.left.shape[1])
        pads = [torch.nn.functional.pad(side[:, :rank], (0, extra)) for side in (self.left, self.right)]
        return pads[0], pads[1]

    def bias(self, matrix: Tensor) -> Tensor | None:
        """Return the best bias (out,) to go with an approximation (out, in); None where none is wanted."""
        return self.outputs - matrix.to(torch.float64) @ self.inputs if self.biased else None


def reduce(weight: Tensor, moments: Moments, target: Target, curvature: Tensor | None = None) -> Reduced:
    """Return the reduced order models of a linear, of every rank.

    Minimizes `E‖K^½ (y - W' x' - b)‖²`. The eigenproblem is that of the smaller side: outputs, `L ᵀA G Aᵀ L` with `K =
    L Lᵀ`, where out <= in; otherwise inputs, `Sᵀ Aᵀ K A S` with `G = S Sᵀ`. G may be singular.

    Parameters
    ----------
    weight : Tensor
        W, (out, in), any float dtype.
    moments : Moments
    target : Target
    curvature : Tensor or None
        K, (out, out): second derivative of the loss by the outputs; None is the identity.
    """
    with pinned():
        wide = weight.to(torch.float64)
        matrix, metric = _problem(wide, moments, target)
        root = None if curvature is None else _curvature_root(curvature)
        weighed = matrix if root is None else root.T @ matrix
        rows, columns = matrix.shape
        basis, energies = _outputs(weighed, metric) if rows <= columns else _inputs(weighed, metric)
        right = weighed.T @ basis
        left = basis if root is None else torch.linalg.solve_triangular(root.T, basis, upper=True)
        size = left.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)  # 1 without a curvature
        seen = moments.mean if moments.original is None or target.kind != "anchored" else moments.original
        return Reduced(left / size, right * size, energies, matrix, wide @ seen, moments.mean, target.bias)


def regression(weight: Tensor, moments: Moments, target: Target, *, biased: bool) -> tuple[Tensor, Tensor | None]:
    """Return the best matrix (out, in) of full rank for a target, and its bias (out,) if one is wanted; float64."""
    with pinned():
        wide = weight.to(torch.float64)
        full, _ = _problem(wide, moments, target)
        seen = moments.mean if moments.original is None else moments.original
        return full, wide @ seen - full @ moments.mean if biased else None


def _problem(weight: Tensor, moments: Moments, target: Target) -> tuple[Tensor, Tensor]:
    """Return what is to be truncated (out, in), and the second moments (in, in) that weigh its error."""
    width = weight.shape[1]
    if target.kind == "weights":
        return weight, torch.eye(width, dtype=torch.float64)
    if target.kind == "diagonal":
        scale = moments.size.clamp_min(FLOOR * float(moments.size.max()) or 1.0) ** target.exponent
        return weight, torch.diag(scale.square())
    second = moments.second
    cross = second if moments.cross is None else moments.cross
    if target.centred:
        seen = moments.mean if moments.original is None else moments.original
        second = second - torch.outer(moments.mean, moments.mean)
        cross = cross - torch.outer(seen, moments.mean)
    if target.kind == "outputs":
        return weight, second
    ridge = target.ridge * moments.second.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    metric = second + ridge
    if moments.cross is None:
        return weight, metric
    found = _solve(metric, (weight @ (cross + ridge)).T).T
    return found, metric


def _solve(metric: Tensor, right: Tensor) -> Tensor:
    """Return `metric⁻¹ right`, by least squares where the metric is singular."""
    factor, failed = torch.linalg.cholesky_ex(metric)
    if not int(failed):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(metric)
    inverse = torch.where(values > FLOOR * values[-1], 1.0 / values, torch.zeros_like(values))
    return vectors @ (inverse.unsqueeze(1) * (vectors.T @ right))


def _curvature_root(curvature: Tensor) -> Tensor:
    """Return lower triangular L, `K + damping = L Lᵀ`."""
    wide = curvature.to(torch.float64)
    mean = float(wide.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(wide), dtype=torch.float64)
    damping = DAMPING
    while True:
        root, failed = torch.linalg.cholesky_ex(wide + damping * mean * torch.eye(len(wide), dtype=torch.float64))
        if not int(failed):
            return root
        damping *= 10.0


def _outputs(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors (out, k) and eigenvalues (k,) of `A G Aᵀ`, falling."""
    product = matrix @ metric @ matrix.T
    values, vectors = torch.linalg.eigh((product + product.T) / 2.0)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = _kept(values)
    return vectors[:, :kept], values[:kept]


def _inputs(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same from the eigenvectors V of `Sᵀ Aᵀ A S`: `U = A S V / σ`, made orthonormal again."""
    spread, axes = torch.linalg.eigh(metric)
    root = axes * spread.clamp_min(0.0).sqrt()
    tall = matrix @ root
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = _kept(values)
    basis, corner = torch.linalg.qr(tall @ vectors[:, :kept])
    return basis * corner.diagonal().sign(), values[:kept]


def _kept(values: Tensor) -> int:
    """Return how many of the falling eigenvalues are more than rounding; at least 1."""
    return max(1, int((values > FLOOR * float(values[0])).sum())) if float(values[0]) > 0 else 1
