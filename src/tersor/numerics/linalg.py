"""Numerical pieces shared by codecs: Hadamard matrices, orthonormal DCT, damped Cholesky."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.numerics import rng


def sylvester(order: int) -> np.ndarray:
    """Return the Sylvester Hadamard matrix of a power-of-two order, entries +1 and -1."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _prime_power(q: int) -> tuple[int, int] | None:
    for p in range(2, math.isqrt(q) + 1):
        if q % p == 0:
            k = 0
            while q % p == 0:
                q, k = q // p, k + 1
            return (p, k) if q == 1 else None
    return (q, 1) if q > 1 else None


def _times(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """Multiply two elements of GF(p^k), coefficient tuples, modulo a monic polynomial (low coefficients first)."""
    k = len(modulus)
    product = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] = (product[i + j] + x * y) % p
    for i in range(2 * k - 2, k - 1, -1):
        for j in range(k):
            product[i - k + j] = (product[i - k + j] - product[i] * modulus[j]) % p
    return tuple(product[:k])


def _squares(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the elements of GF(q), odd q, as coefficient rows (q, k), and chi: 0, +1 or -1 for each (q,)."""
    power = _prime_power(q)
    assert power is not None
    p, k = power
    rows = np.array([[i // p**j % p for j in range(k)] for i in range(q)])
    elements = [tuple(int(c) for c in row) for row in rows]
    for candidate in elements:  # the low coefficients of a monic polynomial; a field has no zero divisors
        square = {_times(e, e, candidate, p) for e in elements[1:]}
        if len(square) == (q - 1) // 2 and elements[0] not in square and _is_field(candidate, elements, p):
            chi = np.array([0] + [1 if e in square else -1 for e in elements[1:]])
            return rows, chi
    raise AssertionError(f"no irreducible polynomial for GF({q})")


def _is_field(modulus: tuple[int, ...], elements: list[tuple[int, ...]], p: int) -> bool:
    if len(modulus) == 1:
        return True
    one = elements[1]
    for generator in elements[p:]:  # a field iff some element has order q - 1
        value, order = generator, 1
        while value != one and order < len(elements):
            value, order = _times(value, generator, modulus, p), order + 1
        if order == len(elements) - 1:
            return True
    return False


def _jacobsthal(q: int) -> np.ndarray:
    rows, chi = _squares(q)
    p, k = _prime_power(q) or (q, 1)
    weights = p ** np.arange(k)
    difference = ((rows[:, None, :] - rows[None, :, :]) % p) @ weights
    return chi[difference]


@cache
def paley(order: int) -> np.ndarray | None:
    """Return a Hadamard matrix of `order` by Paley's constructions I or II, or None where neither applies.

    Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933): order q + 1 for a prime power q = 3 mod 4, and 2 (q + 1)
    for a prime power q = 1 mod 4.
    """
    q = order - 1
    if q % 4 == 3 and _prime_power(q):
        matrix = np.ones((order, order))
        matrix[1:, 1:] = _jacobsthal(q) + np.eye(q)
        matrix[1:, 0] = -1
        matrix[0, 0] = 1
        return matrix
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _prime_power(q):
        conference = np.ones((q + 1, q + 1))
        conference[0, 0] = 0
        conference[1:, 1:] = _jacobsthal(q)
        on, off = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(conference, on) + np.kron(np.eye(q + 1), off)
    return None


@lru_cache(maxsize=64)
def seeded_orthogonal(order: int, seed: int) -> np.ndarray:
    """Return a random orthogonal matrix, float64 (order, order): a product of Householder reflections.

    Made of elementwise arithmetic and plain sums in a fixed order, so that it does not depend on a LAPACK.
    """
    uniform = rng.uniforms(seed, 7, 2 * order * order).reshape(2, order, order)
    normal = np.sqrt(-2.0 * np.log(uniform[0])) * np.cos(2.0 * np.pi * uniform[1])
    matrix = np.diag(np.where(rng.uniforms(seed, 8, order) < 0.5, -1.0, 1.0))
    for i in range(order - 1):
        v = normal[i].copy()
        v[:i] = 0.0
        v /= math.sqrt(math.fsum(v * v))
        matrix -= 2.0 * np.outer(v, (v[:, None] * matrix).sum(axis=0))
    return matrix


def dct(x: Tensor) -> Tensor:
    """Return the orthonormal DCT-II along the last dimension, O(n log n) for any n (Makhoul 1980)."""
    n = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    angle = torch.arange(n, device=x.device, dtype=torch.float64) * (-math.pi / (2 * n))
    twiddle = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    out = (torch.fft.fft(folded) * twiddle).real * math.sqrt(2.0 / n)
    out[..., 0] *= math.sqrt(0.5)
    return out


def idct(y: Tensor) -> Tensor:
    """Return the inverse (transpose) of `dct`."""
    n = y.shape[-1]
    scaled = y * math.sqrt(n / 2.0)
    scaled[..., 0] *= math.sqrt(2.0)
    mirrored = torch.cat([torch.zeros_like(scaled[..., :1]), scaled[..., 1:].flip(-1)], dim=-1)
    angle = torch.arange(n, device=y.device, dtype=torch.float64) * (math.pi / (2 * n))
    twiddle = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    folded = torch.fft.ifft(torch.complex(scaled, -mirrored) * twiddle).real
    out = torch.empty_like(y)
    half = (n + 1) // 2
    out[..., ::2] = folded[..., :half]
    out[..., 1::2] = folded[..., half:].flip(-1)
    return out


def inverse_cholesky(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Return U, upper triangular float32 (n, n), with `Uᵀ U = (H + damping mean(diag H) I)⁻¹`.

    Computed in float64, two such matrices in memory at a time; damping is raised tenfold while the factorization fails
    (GPTQ, Frantar et al. 2023, eq. 3).

    Raises
    ------
    CodecConfigError
        If it fails with 1,000 times the mean diagonal added, too.
    """
    for share in _dampings(damping):
        work, failed = torch.linalg.cholesky_ex(_damped(hessian, share))
        if not int(failed):
            work = torch.cholesky_inverse(work)
            work, failed = torch.linalg.cholesky_ex(work, upper=True)
            if not int(failed):
                return work.to(torch.float32)
    raise _indefinite()


def upper_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Return V, upper triangular float64 (n, n), with `V Vᵀ = H + damping mean(diag H) I`: the inverse of that U.

    With J that reverses order, `V = J L J` where `L Lᵀ = J H J`: one factorization, an eighth of the arithmetic of U.
    Memory, damping and errors are those of `inverse_cholesky`.
    """
    backward = hessian.flip(0, 1)
    for share in _dampings(damping):
        work, failed = torch.linalg.cholesky_ex(_damped(backward, share))
        if not int(failed):
            return work.flip(0, 1)
    raise _indefinite()


def _dampings(least: float) -> Iterator[float]:
    """Yield what is tried, in turn."""
    for _ in range(6):
        yield least
        least = 10.0 * least or 0.001


def _damped(hessian: Tensor, share: float) -> Tensor:
    """Return a copy in float64, with a share of its mean diagonal added."""
    work = hessian.to(torch.float64, copy=True)
    work.diagonal().add_(share * (float(hessian.diagonal().mean(dtype=torch.float64)) or 1.0))
    return work


def _indefinite() -> CodecConfigError:
    return CodecConfigError("the Hessian could not be factorized even with damping 1000 times its mean diagonal; it "
                            "must be symmetric positive semidefinite, such as a mean of x xᵀ")
