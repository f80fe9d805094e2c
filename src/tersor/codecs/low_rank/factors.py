"""The two factors of a low-rank code: leading singular vectors at random, and encoding one factor given the other.

With the right factor fixed, `‖A - L Rᵀ‖² = tr((L - L*) G (L - L*)ᵀ) + rest` with `G = Rᵀ R`, `B = A R`, `L* = B G⁻¹`:
L is to be encoded under the Hessian G, component by component, as error feedback does (`contract/feedback`). Blocks
of components go through at a time, and later rounds start from earlier codes. Derivation: docs/codecs/allocated.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tersor.codecs.low_rank.published import Operator
from tersor.contract.checks import check_matrix
from tersor.contract.codec import Codec, Encoded, Search
from tersor.numerics.linalg import inverse_cholesky

RIDGE = 1e-8  # added to a Gram matrix of unit diagonal before it is inverted: coarse components may coincide
BLOCKS = 16  # blocks of components, at least: within one, nothing is corrected; 4 or 64 give the same errors

Choose: TypeAlias = Callable[[int, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """A matrix A (out, in) whose errors E are weighed as `tr(E H Eᵀ)`; H = I without a Hessian.

    Parameters
    ----------
    operator : Operator
    hessian : Tensor or None
        (in, in), of mean diagonal 1, in the operator's dtype and on its device.
    root : Tensor or None
        Lower triangular S with `S Sᵀ = H + damping I`, float64.
    """

    operator: Operator
    hessian: Tensor | None = None
    root: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor, hessian: Tensor | None, damping: float) -> Weighted:
        """Scale the matrix and, if there is one, scale and factorize the Hessian; raise damping until that works."""
        operator = Operator.of(matrix)
        if hessian is None or not float(hessian.diagonal().mean()) > 0:
            return cls(operator)
        metric = hessian.to(device=matrix.device, dtype=torch.float64)
        metric = metric / metric.diagonal().mean()
        while True:
            root, failed = torch.linalg.cholesky_ex(metric + damping * torch.eye(len(metric)).to(metric))
            if not int(failed):
                return cls(operator, metric.to(operator.dtype), root)
            damping *= 10.0

    def metric(self, right: Tensor) -> Tensor:
        """Return `H R` for R (in, k)."""
        return right if self.hessian is None else self.hessian @ right

    def spectrum(self, rank: int, oversample: int, power_iterations: int,
                 generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return balanced factors of the best approximation of rank `rank`, and its singular values.

        Randomized range finder with orthonormalized power iterations (Halko, Martinsson, Tropp, SIAM Review 53, 2011,
        algorithms 4.4 and 5.1) on `A S`, then `L = U √Σ` and `R = S⁻ᵀ V √Σ`: rank-constrained regression. Values below
        float32 rounding of the largest are taken for 0.

        Returns
        -------
        (left, right, values)
            (out, rank), (in, rank), (rank,).
        """
        rows, width = self.operator.shape
        count = min(rank + oversample, rows, width)
        sketch = torch.randn(width, count, generator=generator, dtype=torch.float64)
        found = torch.linalg.qr(self._times(sketch)).Q
        for _ in range(power_iterations):
            found = torch.linalg.qr(self._times(torch.linalg.qr(self._transposed(found)).Q)).Q
        across, corner = torch.linalg.qr(self._transposed(found))
        u, values, v = torch.linalg.svd(corner)
        least = float(values[0]) * max(rows, width) * torch.finfo(torch.float32).eps
        values = torch.where(values > least, values, torch.zeros_like(values))[:rank]
        left, right = found @ v[:rank].T, across @ u[:, :rank]
        if self.root is not None:
            right = torch.linalg.solve_triangular(self.root.T, right.to(torch.float64), upper=True).to(right.dtype)
        return left * values.sqrt(), right * values.sqrt(), values

    def _times(self, x: Tensor) -> Tensor:
        x = x.to(self.operator.matrix.device)
        return self.operator.times(x if self.root is None else self.root @ x.to(torch.float64))

    def _transposed(self, y: Tensor) -> Tensor:
        found = self.operator.transposed_times(y)
        return found if self.root is None else (self.root.T @ found.to(torch.float64)).to(found.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """One factor: its codec, how the codec searches, and the power of two by which its numbers are stored.

    Parameters
    ----------
    codec : Codec
    how : Search
        Without a Hessian.
    exponent : int
    """

    codec: Codec
    how: Search
    exponent: int

    def plain(self, factor: Tensor) -> tuple[Encoded, Tensor]:
        """Encode a factor (rows, rank) regardless of the other; return it encoded and decoded."""
        encoded = self.codec.search(self._stored(factor), self.how)
        return encoded, self._back(encoded.decode(), factor)

    def given(self, product: Tensor, gram: Tensor, before: Tensor | None) -> tuple[Encoded, Tensor]:
        """Encode a factor F so that `tr(F G Fᵀ) - 2 tr(F Bᵀ)` is small; return it encoded and decoded.

        Parameters
        ----------
        product : Tensor
            B, (rows, rank): the matrix times the other factor.
        gram : Tensor
            G, float64 (rank, rank): the other factor's Gram matrix.
        before : Tensor or None
            An earlier solution, decoded: each component is chosen anew given all others. Without one, components are
            chosen from first to last, those still to come free to make up for the error of those before.
        """
        if not self.codec.traits().column_wise:
            return self.plain(solve(product, gram))
        best = solve(product, gram) if before is None else step(before, product, gram)
        encoder = self.codec.columns(self._stored(best), self.how)
        if encoder.width != 1:
            return self.plain(solve(product, gram))

        def choose(start: int, target: Tensor) -> Tensor:
            return self._back(encoder.block(start, self._stored(target).to(torch.float32)), target)

        decoded = feed(best, gram, choose) if before is None else sweep(before, product, gram, choose)
        return encoder.finish(), decoded

    def _stored(self, factor: Tensor) -> Tensor:
        scaled = factor * 2.0**self.exponent  # half of a float32's exponent at most: exact in float32
        check_matrix(scaled, "factor")
        return scaled.contiguous()

    def _back(self, decoded: Tensor, like: Tensor) -> Tensor:
        return decoded.to(like.dtype) * 2.0**-self.exponent


def gram_of(factor: Tensor) -> Tensor:
    """Return `Fᵀ F`, float64 (rank, rank)."""
    wide = factor.to(torch.float64)
    return wide.T @ wide


def solve(product: Tensor, gram: Tensor) -> Tensor:
    """Return `B G⁻¹` of the shape of B (rows, rank); components without energy give 0."""
    scaled, inverse = _correlations(gram)
    factor = torch.linalg.cholesky(scaled)
    found = torch.cholesky_solve((product.to(torch.float64) * inverse).T, factor).T * inverse
    return torch.where(gram.diagonal() > 0, found, torch.zeros_like(found)).to(product.dtype)


def feed(best: Tensor, gram: Tensor, choose: Choose) -> Tensor:
    """Encode `best` (rows, rank) block by block, pushing errors onto later blocks; return it decoded.

    As `feedback.encode_with_feedback`, with several components a block: within a block nothing is corrected.
    """
    scaled, inverse = _correlations(gram)
    upper = inverse_cholesky(scaled, 0.0).to(best.dtype) * inverse.to(best.dtype)
    work, decoded = best.clone(), torch.empty_like(best)
    for start, stop in _blocks(best.shape[1]):
        decoded[:, start:stop] = choose(start, work[:, start:stop])
        error = torch.linalg.solve_triangular(upper[start:stop, start:stop],
                                              work[:, start:stop] - decoded[:, start:stop], upper=True, left=False)
        work[:, stop:] -= error @ upper[start:stop, stop:]
    return decoded


def sweep(before: Tensor, product: Tensor, gram: Tensor, choose: Choose) -> Tensor:
    """Choose each component of a decoded factor (rows, rank) anew, given all others; return it decoded."""
    decoded = before.clone()
    for start, stop in _blocks(before.shape[1]):
        decoded[:, start:stop] = choose(start, step(decoded, product, gram, start, stop))
    return decoded


def step(factor: Tensor, product: Tensor, gram: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return the best real numbers for components `start` to `stop`, each given all others: `f_j + (B - F G)_j / G_jj`.

    Shape (rows, stop - start); components without energy keep what they have.
    """
    power = gram.diagonal()[start:stop]
    inverse = torch.where(power > 0, 1.0 / power, 0.0).to(product.dtype)
    rest = product[:, start:stop] - factor @ gram[:, start:stop].to(product.dtype)
    return factor[:, start:stop] + rest * inverse


def _blocks(rank: int) -> list[tuple[int, int]]:
    step = max(1, rank // BLOCKS)
    return [(start, min(start + step, rank)) for start in range(0, rank, step)]


def _correlations(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return a Gram matrix scaled to the diagonal `1 + RIDGE`, and by what rows and columns were scaled."""
    power = gram.diagonal()
    inverse = torch.where(power > 0, power.rsqrt(), 1.0)
    scaled = gram * inverse * inverse.unsqueeze(1)
    scaled.diagonal().copy_(torch.full_like(power, 1.0 + RIDGE))
    return scaled, inverse
