"""Vectors split over two orthogonal bases, `x = u + Pᵀ v` with small peaks: Kashin decompositions.

P is orthogonal and regenerated from a seed. A good P has no vector that is short, in the sum of magnitudes, in both
bases (Kashin 1977); a single signed Hadamard transform does have some, two of them around random signs do not. The
choices are those of Merkulov et al. (arXiv 2404.09737), a random matrix and butterflies, and of the follow-up (arXiv
2609.11687), IDCT-signs-DCT, to which its Hadamard counterpart is added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.numerics import rng
from tersor.numerics.linalg import dct, idct
from tersor.numerics.rotation import MAX_FACTOR, Rotation, factor_orders

KINDS = ("hadamard", "dct", "butterfly", "dense")
MAX_DENSE = 2048
BUTTERFLIES = 3
LEADING = 8  # greedy steps whose lengths are returned
_SALT = 0x6B617368696E  # keeps the streams apart from those of a rotation of the same seed
_SIGNS, _NORMAL, _FLIPS, _ANGLES, _ORDER = 2, 3, 4, 16, 48  # streams of random numbers


class Orthogonal(Protocol):
    """An orthogonal map of the last dimension, and its inverse."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `P x`: (*batch, n) float32 to the same shape."""
        ...

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`."""
        ...


@dataclasses.dataclass(frozen=True)
class Basis:
    """An orthogonal P of vectors of `width` elements.

    Parameters
    ----------
    kind : str
        `"hadamard"`: `Rᵀ signs R` with R a `Rotation` (`numerics`), symmetric, for widths `m 2^k` with odd m up to
        512; `"dct"`: IDCT-signs-DCT, symmetric, any width; `"butterfly"`: three random butterflies, each followed by a
        random permutation, even widths; `"dense"`: a random matrix, widths up to 2,048.
    width : int
    seed : int
        Part of the format, like the recipes below.

    Raises
    ------
    CodecConfigError
        If the kind is unknown or cannot take the width; names those that can.
    """

    kind: str
    width: int
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CodecConfigError(f"basis: transform must be one of {KINDS}, found {self.kind!r}")
        limit = _limit(self.kind, self.width)
        if limit:
            others = ", ".join(f"'{kind}'" for kind in KINDS if not _limit(kind, self.width))
            raise CodecConfigError(f"transform '{self.kind}' cannot take vectors of width {self.width}: {limit}; at "
                                   f"this width these can: {others}")

    def forward(self, x: Tensor) -> Tensor:
        """Return `P x` along the last dimension: (*batch, width) float32 to the same shape."""
        if self.kind == "dense":
            return x @ _dense(self.width, self.seed, x.device).T
        if self.kind == "butterfly":
            return self._butterflies(x)
        return self._involution(x)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`; also its transpose."""
        if self.kind == "dense":
            return y @ _dense(self.width, self.seed, y.device)
        if self.kind == "butterfly":
            return self._butterflies_back(y)
        return self._involution(y)

    def _involution(self, x: Tensor) -> Tensor:
        signs = _signs(self.width, self.seed, x.device)
        if self.kind == "dct":
            return idct(dct(x) * signs) if x.numel() else x
        rotation = Rotation(self.width, self.seed + _SALT)
        return rotation.inverse(rotation.forward(x) * signs)

    def _butterflies(self, x: Tensor) -> Tensor:
        for cosines, sines, order in _stages(self.width, self.seed, x.device):
            for cosine, sine in zip(cosines, sines, strict=True):
                even, odd = x[..., ::2], x[..., 1::2]
                x = torch.cat([cosine * even - sine * odd, sine * even + cosine * odd], -1)
            x = x[..., order]
        return x

    def _butterflies_back(self, y: Tensor) -> Tensor:
        half = self.width // 2
        for cosines, sines, order in reversed(_stages(self.width, self.seed, y.device)):
            x = torch.empty_like(y)
            x[..., order] = y
            for cosine, sine in zip(cosines.flip(0), sines.flip(0), strict=True):
                even, odd = x[..., :half], x[..., half:]
                x = torch.stack([cosine * even + sine * odd, cosine * odd - sine * even], -1).flatten(-2)
            y = x
        return y


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """`X -> P_out X P_inᵀ` of whole matrices, each flattened to a vector of `out.width * in_.width` elements."""

    out: Basis
    in_: Basis

    def forward(self, x: Tensor) -> Tensor:
        """Transform flattened matrices: (*batch, out in) float32 to the same shape."""
        return self._apply(x, self.out.forward, self.in_.forward)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`; also its transpose."""
        return self._apply(y, self.out.inverse, self.in_.inverse)

    def _apply(self, x: Tensor, out: Callable[[Tensor], Tensor], in_: Callable[[Tensor], Tensor]) -> Tensor:
        turned = in_(x.unflatten(-1, (self.out.width, self.in_.width)))
        return out(turned.transpose(-1, -2).contiguous()).transpose(-1, -2).flatten(-2)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Vectors `u + Pᵀ v`, up to a residual.

    Parameters
    ----------
    first, second : Tensor
        u and v, float32 (k, n).
    residual : Tensor
        Norm of what is left over that of the vector, float32 (k,); 0 for a zero vector.
    steps : Tensor
        Steps taken, int64 (k,).
    leading : Tensor
        Lengths of the first steps, one in u in column 0, one in v in column 1: float32 (k, 8, 2); zeros unless greedy.
    """

    first: Tensor
    second: Tensor
    residual: Tensor
    steps: Tensor
    leading: Tensor


def greedy(vectors: Tensor, basis: Orthogonal, *, fixed: bool = False, tolerance: float = 1e-6,
           iterations: int = 1000) -> Split:
    """Split vectors by Kashin's greedy steps: take the projection on the residual's signs, in one basis or the other.

    Merkulov et al. 2024 (algorithm 2 of the follow-up's appendix). A step of length `c = |r|₁ / n` in every element
    lowers the squared residual by `|r|₁² / n`. Elements that are 0 stay: n counts the others.

    Parameters
    ----------
    vectors : Tensor
        Float32 (k, n), of magnitudes near 1.
    basis : Orthogonal
    fixed : bool
        Steps u, u, v, v, u, u, ..; else each in the basis in which the residual's sum of magnitudes is larger.
    tolerance : float
        A vector is done when its residual is at most this part of its norm.
    iterations : int
        Most steps.
    """
    state = _State.start(vectors, tolerance)
    leading = torch.zeros(len(vectors), LEADING, 2, dtype=torch.float32, device=vectors.device)
    for step in range(iterations):
        active = state.unfinished()
        if not active.numel():
            break
        residual = state.residual[active]
        turned = basis.forward(residual) if not fixed or step % 4 >= 2 else residual
        across = torch.full_like(active, step % 4 >= 2, dtype=torch.bool)
        if not fixed:
            across = turned.abs().sum(-1) >= residual.abs().sum(-1)
        signs = torch.where(across.unsqueeze(-1), turned, residual)
        length = signs.abs().sum(-1)
        signs = signs.sign_()
        length = length / signs.abs().sum(-1).clamp_min_(1.0)
        signs = signs.mul_(length.unsqueeze(-1))
        if step < LEADING:
            leading[active, step, across.to(torch.int64)] = length
        here, there = active[~across], active[across]
        state.take(here, signs[~across], None)
        if there.numel():
            state.take(there, basis.inverse(signs[across]), signs[across])
        state.steps[active] += 1
    return state.close(leading)


def clipping(vectors: Tensor, basis: Orthogonal, *, eta: float = 0.9, delta: float = 1.0, tolerance: float = 1e-6,
             iterations: int = 1000) -> Split:
    """Split vectors by clipping the residual's coefficients in the tight frame `[I, P] / √2`.

    Lyubarskii and Vershynin, IEEE Trans. Inf. Theory 56 (2010): the clipping level starts at `|x| / √(delta 2n)` and
    falls by `eta` a step, so that every coefficient ends within `|x| / ((1 - eta) √(delta 2n))`.

    Parameters
    ----------
    vectors, basis, tolerance, iterations
        As in `greedy`.
    eta, delta : float
        Of the frame's uncertainty principle; .9 and 1 are those of the DRIVE and TensorFlow encoders.
    """
    state = _State.start(vectors, tolerance)
    level = state.norms / (delta * 2 * vectors.shape[1]) ** 0.5
    root = 0.5**0.5
    for _ in range(iterations):
        active = state.unfinished()
        if not active.numel():
            break
        most = level[active].unsqueeze(-1)
        residual = state.residual[active]
        second = (basis.forward(residual) * root).clamp_(-most, most) * root
        first = (residual * root).clamp_(-most, most) * root
        state.take(active, first, None)
        state.take(active, basis.inverse(second), second)
        state.steps[active] += 1
        level[active] *= eta
    return state.close(torch.zeros(len(vectors), LEADING, 2, dtype=torch.float32, device=vectors.device))


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """Vectors on their way to being split."""

    residual: Tensor
    first: Tensor
    second: Tensor
    norms: Tensor
    steps: Tensor
    tolerance: float

    @classmethod
    def start(cls, vectors: Tensor, tolerance: float) -> _State:
        """Return the state before any step."""
        steps = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        norms = torch.linalg.vector_norm(vectors, dim=-1)
        return cls(vectors.clone(), torch.zeros_like(vectors), torch.zeros_like(vectors), norms, steps, tolerance)

    def unfinished(self) -> Tensor:
        """Return the vectors whose residual is above the tolerance, int64."""
        left = torch.linalg.vector_norm(self.residual, dim=-1)
        return (left > self.tolerance * self.norms).nonzero().squeeze(-1)

    def take(self, index: Tensor, part: Tensor, second: Tensor | None) -> None:
        """Move `part` (m, n) of the vectors at `index` from the residual to u, or to v as `second`."""
        self.residual[index] -= part
        if second is None:
            self.first[index] += part
        else:
            self.second[index] += second

    def close(self, leading: Tensor) -> Split:
        """Return the split reached."""
        left = torch.linalg.vector_norm(self.residual, dim=-1)
        share = torch.where(self.norms > 0, left / torch.where(self.norms > 0, self.norms, 1.0), 0.0)
        return Split(self.first, self.second, share, self.steps, leading)


def _limit(kind: str, width: int) -> str:
    """Return why a kind cannot take a width, or nothing."""
    if kind == "hadamard" and factor_orders(width) is None:
        return f"its odd factor {width // (width & -width)} exceeds {MAX_FACTOR}"
    if kind == "butterfly" and width % 2:
        return "butterflies need an even width"
    if kind == "dense" and width > MAX_DENSE:
        return f"a dense random matrix is made only up to {MAX_DENSE}"
    return ""


@lru_cache(maxsize=64)
def _signs(width: int, seed: int, device: torch.device) -> Tensor:
    return rng.signs(seed + _SALT, _SIGNS, width).to(device)


@lru_cache(maxsize=8)
def _dense(width: int, seed: int, device: torch.device) -> Tensor:
    return torch.from_numpy(haar(width, seed + _SALT).astype(np.float32)).to(device)


def haar(order: int, seed: int) -> np.ndarray:
    """Return an orthogonal matrix, uniformly random, float64 (order, order).

    Stewart, SIAM J. Numer. Anal. 17 (1980): Householder reflections that turn one axis after another to a random
    direction. (Those of `seeded_orthogonal` are about random directions, which leaves the first axes of a
    large matrix nearly where they were.) Elementwise arithmetic and sums in a fixed order: no LAPACK.
    """
    uniform = rng.uniforms(seed, _NORMAL, 2 * order * order).reshape(2, order, order)
    normal = np.sqrt(-2.0 * np.log(uniform[0])) * np.cos(2.0 * np.pi * uniform[1])
    matrix = np.diag(np.where(rng.uniforms(seed, _FLIPS, order) < 0.5, -1.0, 1.0))
    for i in range(order - 1):
        v = normal[i, i:].copy()
        v[0] += math.copysign(math.sqrt(math.fsum(v * v)), v[0])
        v /= math.sqrt(math.fsum(v * v))
        matrix[i:] -= 2.0 * np.outer(v, (v[:, None] * matrix[i:]).sum(axis=0))
    return matrix


@lru_cache(maxsize=16)
def _stages(width: int, seed: int, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Return (cosines, sines (stages, width / 2), permutation (width,)) of every butterfly.

    A stage turns neighbours and sorts the even positions before the odd ones: at `width = 2^k`, k stages make the
    butterfly network of the FFT, and at another even width `⌈log₂ width⌉` stages still join every pair of positions.
    """
    count, found = math.ceil(math.log2(width)), []
    for which in range(BUTTERFLIES):
        angles = 2.0 * np.pi * rng.uniforms(seed + _SALT, _ANGLES + which, count * (width // 2))
        parts = [torch.from_numpy(part(angles).astype(np.float32)).reshape(count, -1).to(device)
                 for part in (np.cos, np.sin)]
        found.append((parts[0], parts[1], rng.permutation(seed + _SALT, _ORDER + which, width).to(device)))
    return tuple(found)
