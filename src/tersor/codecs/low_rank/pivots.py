"""Rows of a matrix of low rank as combinations of a few of them: pivots, and bounded coefficients.

Of `W = B A` with B (n, r), choose r rows so that `W = P [I; Z] W[pivots]`: r (d1 + d2 - r) numbers instead of r (d1 +
d2), because B and A are determined only up to an invertible matrix between them. Pivots of Gaussian elimination, then
exchanges of rows until no coefficient is larger than a bound (maxvol: Goreinov et al., "How to find a good submatrix",
2010).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1.25  # no coefficient is larger, unless rounding stops the exchanges; 1 would be the most volume
_SWAPS = 50  # exchanges allowed, as multiples of the rank


def interpolate(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return pivot rows and the coefficients of all others.

    Exact for any B of r columns, singular ones too: with `B = P L U`, U drops out. Every exchange raises the volume of
    the pivot rows of L by more than `LARGEST`, so exchanges end.

    Parameters
    ----------
    basis : Tensor
        B, (n, r) with r <= n, float64.

    Returns
    -------
    (pivots, coefficients)
        int64 (r,), rising; float64 (n - r, r), for the other rows in order: `B[others] = Z B[pivots]`.
    """
    rows, rank = basis.shape
    order, lower = _eliminate(basis)
    pivots, others = order[:rank].clone(), order[rank:].clone()
    found = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    for _ in range(_SWAPS * rank if rows > rank else 0):
        place = int(found.abs().argmax())
        row, column = divmod(place, rank)
        value = float(found[row, column])
        if abs(value) <= LARGEST:
            break
        found = _exchange(found, row, column, value)
        pivots[column], others[row] = others[row].clone(), pivots[column].clone()
    by_pivot, by_other = pivots.argsort(), others.argsort()
    return pivots[by_pivot], found[by_other][:, by_pivot]


def _eliminate(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of rows (n,) and L (n, r) of Gaussian elimination with partial pivoting."""
    scale = basis.abs().amax().clamp_min(torch.finfo(basis.dtype).tiny)
    factors, swaps, _ = torch.linalg.lu_factor_ex(basis / scale)
    order = torch.arange(basis.shape[0])
    for step, other in enumerate((swaps.to(torch.int64) - 1).tolist()):
        order[[step, other]] = order[[other, step]]
    rank = basis.shape[1]
    lower = factors.tril(-1)
    lower[:rank] += torch.eye(rank, dtype=basis.dtype)
    return order, torch.nan_to_num(lower)


def _exchange(found: Tensor, row: int, column: int, value: float) -> Tensor:
    """Return the coefficients once another row takes a pivot's place: a rank-one update."""
    step = found[row] / value
    fresh = found - torch.outer(found[:, column], step)
    fresh[:, column] = found[:, column] / value
    fresh[row] = -step
    fresh[row, column] = 1.0 / value
    return fresh
