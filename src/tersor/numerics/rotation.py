"""Seeded random rotations with fast transforms at any width, for incoherence processing.

`Rotation(width, seed)` is `T D`: random signs, then an orthonormal transform T. T is the Kronecker product of Hadamard
matrices where the width allows: a Paley factor times Sylvester factors for `m 2^k`; where Paley's constructions give
none, a seeded orthogonal factor of the odd part; and where the odd part exceeds 512, DCT-sign-DCT. Never zero padding.
Sylvester parts are applied as dense factors of at most 64, which processors multiply faster than they do butterflies.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tersor.numerics import rng
from tersor.numerics.linalg import dct, idct, paley, seeded_orthogonal, sylvester

MAX_FACTOR = 512
_SYLVESTER_LIMIT = 64


@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal map of vectors of `width` elements, regenerated from `seed`.

    Parameters
    ----------
    width : int
    seed : int
        Part of the format: the recipe in `rng` and the choice of factors never change for a codec version.
    """

    width: int
    seed: int

    def forward(self, x: Tensor) -> Tensor:
        """Rotate along the last dimension: (*batch, width) float32 to the same shape."""
        signs = _signs(self.width, self.seed, 0, x.device)
        factors = _factors(self.width, self.seed, x.device)
        if factors is None:
            return dct(dct(x * signs) * _signs(self.width, self.seed, 1, x.device))
        return _apply(x * signs, factors)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`; also its transpose."""
        signs = _signs(self.width, self.seed, 0, y.device)
        factors = _factors(self.width, self.seed, y.device)
        if factors is None:
            return idct(idct(y) * _signs(self.width, self.seed, 1, y.device)) * signs
        return _apply(y, tuple(f.T for f in factors)) * signs

    def conjugate(self, hessian: Tensor) -> Tensor:
        """Return `R H Rᵀ` for a symmetric H (width, width), float32."""
        return self.forward(self.forward(hessian.to(torch.float32)).T.contiguous())


def factor_orders(width: int) -> tuple[int, ...] | None:
    """Return the orders of the Kronecker factors, or None where DCT-sign-DCT is used."""
    odd = width // (width & -width)
    if odd > MAX_FACTOR:
        return None
    power = (width // odd).bit_length() - 1
    if odd == 1:
        return (1, *_sylvester_orders(power))
    for k in range(2, power + 1):
        order = odd << k
        if order <= MAX_FACTOR and paley_exists(order):
            return (order, *_sylvester_orders(power - k))
    return (odd, *_sylvester_orders(power))


def paley_exists(order: int) -> bool:
    """Tell whether Paley's constructions give a Hadamard matrix of this order."""
    return paley(order) is not None


def _sylvester_orders(power: int) -> tuple[int, ...]:
    parts = -(-power // int(math.log2(_SYLVESTER_LIMIT)))
    return tuple(2 ** (power // parts + (i < power % parts)) for i in range(parts)) if parts else ()


@lru_cache(maxsize=64)
def _factors(width: int, seed: int, device: torch.device) -> tuple[Tensor, ...] | None:
    orders = factor_orders(width)
    if orders is None:
        return None
    first = orders[0]
    hadamard = paley(first) if first % 4 == 0 and first > 2 else None
    lead = hadamard / math.sqrt(first) if hadamard is not None else seeded_orthogonal(first, seed)
    matrices = [lead] if first > 1 else []
    matrices += [sylvester(order) / math.sqrt(order) for order in orders[1:]]
    return tuple(torch.from_numpy(np.ascontiguousarray(m, dtype=np.float32)).to(device) for m in matrices)


@lru_cache(maxsize=64)
def _signs(width: int, seed: int, stream: int, device: torch.device) -> Tensor:
    return rng.signs(seed, stream, width).to(device)


def _apply(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Apply the Kronecker product of `factors` to the last dimension."""
    shape, width = x.shape, x.shape[-1]
    after = width
    for factor in factors:
        order = factor.shape[0]
        after //= order
        x = (x.reshape(-1, order) @ factor.T if after == 1
             else torch.matmul(factor, x.reshape(-1, order, after)))
    return x.reshape(shape)
