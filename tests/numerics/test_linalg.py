"""Hadamard matrices, the orthonormal DCT, damped Cholesky, thread control."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tersor.errors import CodecConfigError
from tersor.numerics.linalg import (
    dct,
    idct,
    inverse_cholesky,
    paley,
    seeded_orthogonal,
    sylvester,
    upper_factor,
)
from tersor.testing import gaussian, tolerance

# orders up to 120 by Paley: q + 1 for q = 3 mod 4, 2 (q + 1) for q = 1 mod 4, q a prime power
FIRST = [4, 8, 12, 20, 24, 28, 32, 44, 48, 60, 68, 72, 80, 84, 104, 108]
SECOND = [12, 20, 28, 36, 52, 60, 76, 84, 100, 108]
NONE = [2, 6, 10, 16, 40, 92, 116, 172]  # no construction of Paley's; 92 is famous


@pytest.mark.parametrize("order", sorted({*FIRST, *SECOND, 344, 504}))
def test_paley_is_hadamard(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert matrix.shape == (order, order)
    assert np.array_equal(np.abs(matrix), np.ones((order, order)))
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))  # exact: small integers


@pytest.mark.parametrize("order", NONE)
def test_no_paley(order: int) -> None:
    assert paley(order) is None


@pytest.mark.parametrize("order", [1, 2, 4, 64, 256])
def test_sylvester_is_hadamard(order: int) -> None:
    matrix = sylvester(order)
    assert np.array_equal(np.abs(matrix), np.ones((order, order)))
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [1, 2, 3, 43, 97])
def test_seeded_orthogonal(order: int) -> None:
    matrix = seeded_orthogonal(order, 3)
    assert np.abs(matrix @ matrix.T - np.eye(order)).max() <= tolerance(torch.float64, order * order)
    assert order < 3 or not np.allclose(matrix, seeded_orthogonal(order, 4))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 97, 1009])
def test_dct_equals_its_definition(n: int) -> None:
    k, i = np.arange(n)[:, None], np.arange(n)[None, :]
    basis = np.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2.0 / n)
    basis[0] *= math.sqrt(0.5)
    x = gaussian((5, n))
    expected = x.double() @ torch.from_numpy(basis).T
    bound = tolerance(torch.float32, n) * float(x.norm())
    assert float((dct(x).double() - expected).norm()) <= bound
    assert float((idct(dct(x)) - x).norm()) <= 2 * bound
    assert float((idct(x).double() - x.double() @ torch.from_numpy(basis)).norm()) <= bound
    assert dct(x).dtype == idct(x).dtype == torch.float32


@pytest.mark.parametrize("n", [1, 5, 40])
def test_inverse_cholesky(n: int) -> None:
    samples = gaussian((3 * n, n)).double()
    hessian = samples.T @ samples
    upper = inverse_cholesky(hessian.float(), 0.05)
    damped = hessian.float().double() + 0.05 * float(hessian.float().double().diagonal().mean()) * torch.eye(n)
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    product = upper.double().T @ upper.double() @ damped
    condition = float(torch.linalg.cond(damped))
    assert float((product - torch.eye(n)).norm()) <= condition * tolerance(torch.float32, n) * n**0.5


@pytest.mark.parametrize("n", [1, 5, 40])
def test_upper_factor(n: int) -> None:
    samples = gaussian((3 * n, n)).double()
    hessian = (samples.T @ samples).float()
    damped = hessian.double() + 0.05 * float(hessian.double().diagonal().mean()) * torch.eye(n, dtype=torch.float64)
    upper = upper_factor(hessian, 0.05)
    assert upper.dtype == torch.float64
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    assert float((upper @ upper.T - damped).norm()) <= tolerance(torch.float64, n) * float(damped.norm())
    product = upper @ inverse_cholesky(hessian, 0.05).double()
    assert float((product - torch.eye(n)).norm()) <= float(torch.linalg.cond(damped)) * tolerance(torch.float32, n)


def test_upper_factor_of_degenerate_hessians() -> None:
    assert torch.equal(upper_factor(torch.zeros(4, 4), 0.25), 0.5 * torch.eye(4, dtype=torch.float64))
    assert bool(torch.isfinite(upper_factor(torch.ones(6, 6), 0.0)).all())
    with pytest.raises(CodecConfigError, match="positive semidefinite"):
        upper_factor(torch.diag(torch.tensor([1.0, -1e9, 1e9])))


def test_inverse_cholesky_of_degenerate_hessians() -> None:
    upper = inverse_cholesky(torch.zeros(4, 4), 0.01)
    assert float((upper - 10.0 * torch.eye(4)).abs().max()) <= 10.0 * tolerance(torch.float32, 1)
    rank_one = torch.ones(6, 6)
    assert bool(torch.isfinite(inverse_cholesky(rank_one, 0.0)).all())
    with pytest.raises(CodecConfigError, match="positive semidefinite"):
        inverse_cholesky(torch.diag(torch.tensor([1.0, -1e9, 1e9])))
