"""LPLR, LSVD, DSVD and NQ transcribed from their description, sharing nothing with Tersor.

Saha, Srivastava, Pilanci, arXiv 2310.11028: algorithm 1 and the quantizer of the experiments. Computed in the dtype of
the matrix: the released code runs LPLR in float32 and DSVD and NQ in float64, and where the right factor has 4 bits or
fewer, that shows: an entry of the first component that falls to the other side of a threshold moves the error by 1 %.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

Array = np.ndarray


def quantize(x: Array, bits: int) -> Array:
    """Round to the nearest of 2**bits levels, uniform between the least and the largest entry, both included."""
    low, high = float(x.min()), float(x.max())
    if low == high:
        return x.copy()
    step = (high - low) / (2**bits - 1)
    return (low + step * np.rint((x.astype(np.float64) - low) / step)).astype(x.dtype)


def lplr(a: Array, sketch: Array, left_bits: int, right_bits: int) -> Array:
    """Return Q(A S) Q'(Q(A S)⁺ A)."""
    product = torch.from_numpy(a) @ torch.from_numpy(sketch.astype(a.dtype))  # in the order of the released code's sums
    return _resolved(a, product.numpy(), left_bits, right_bits)


def lsvd(a: Array, turn: Array, left_bits: int, right_bits: int) -> Array:
    """Return Q(U Σ S) Q'(Q(U Σ S)⁺ A) for the leading singular vectors."""
    u, values, _ = _svd(a.tobytes(), a.shape, a.dtype)
    rank = len(turn)
    return _resolved(a, (u[:, :rank] * values[:rank]) @ turn.astype(a.dtype), left_bits, right_bits)


def dsvd(a: Array, rank: int, left_bits: int, right_bits: int, signs: Array | None = None) -> Array:
    """Return Q(U) Q'(Σ Vᵀ); `signs` (rank,) of ±1 turn pairs of singular vectors round, which only Q notices."""
    u, values, v = _svd(a.tobytes(), a.shape, a.dtype)
    turn = np.ones(rank) if signs is None else signs
    return quantize(u[:, :rank] * turn, left_bits) @ quantize((values[:rank] * turn)[:, None] * v[:rank], right_bits)


def normalized(a: Array, y: Array) -> Array:
    """Return alpha y + beta, fitted to a by least squares."""
    a, y = a.astype(np.float64), y.astype(np.float64)
    ones = np.ones(a.size)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([y.ravel(), ones], 1), a.ravel(), rcond=None)
    return alpha * y + beta


def error(a: Array, y: Array) -> float:
    """Return the relative Frobenius error."""
    return float(np.linalg.norm(a.astype(np.float64) - y) / np.linalg.norm(a))


def _resolved(a: Array, basis: Array, left_bits: int, right_bits: int) -> Array:
    left = quantize(basis, left_bits)
    weights = np.linalg.pinv(left.astype(np.float64)) @ a  # rounded once: what float32 solvers add is no part of it
    return left @ quantize(weights, right_bits)


@lru_cache(maxsize=2)
def _svd(data: bytes, shape: tuple[int, int], dtype: np.dtype) -> tuple[Array, Array, Array]:
    return np.linalg.svd(np.frombuffer(data, dtype).reshape(shape), full_matrices=False)
