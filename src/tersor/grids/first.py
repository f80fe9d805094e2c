"""First scales and zeros: weighted least squares over each group by itself, after several widths of its levels."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.grids.scheme import Scheme
from tersor.grids.state import State, inverse, nearest, stored

TRIALS = 16  # widths that are tried
NARROW = {2: 0.45, 3: 0.55, 4: 0.75, 5: 0.85, 6: 0.92}  # shares of a group's range that levels reach at the least


def first(scheme: Scheme, target: Tensor, weights: Tensor, dtype: torch.dtype) -> State:
    """Return a state whose scales fit `target` (n, w) under weights (w,); levels are still to be chosen."""
    size = scheme.size(target.shape[1])
    parts, heavy = target.reshape(len(target), -1, size), weights.reshape(1, -1, size)
    low, high = parts.amin(-1), parts.amax(-1)
    energy = (heavy * parts * parts).sum(-1)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.zeros_like(low), torch.zeros_like(low)
    for step, zero in _tried(scheme, low, high):
        level = nearest(scheme, parts * inverse(step)[..., None] + zero[..., None]) - zero[..., None]
        fit, size_ = (heavy * parts * level).sum(-1), (heavy * level * level).sum(-1)
        scale = stored(fit * inverse(size_), dtype)
        error = energy - 2 * scale * fit + scale * scale * size_
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return State(torch.zeros_like(target, dtype=torch.int8), scales, zeros)


def _tried(scheme: Scheme, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of scales and zeros (n, g) that are tried."""
    shares = torch.linspace(NARROW.get(scheme.bits, 0.97), 1.05, TRIALS).tolist()
    none = torch.zeros_like(low)
    if scheme.symmetric:
        peak = torch.maximum(-low, high)
        return [(sign * share * peak / -scheme.low, none) for share in shares for sign in (1.0, -1.0)]
    top = float(scheme.high - scheme.low)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    found = []
    for share in shares:
        step = share * (high - low) / top
        middle = (high + low) / 2
        exact = (scheme.high + scheme.low) / 2 - middle * inverse(step)
        found += [(step, nearest(scheme, rounded)) for rounded in (exact.floor(), exact.ceil())]
    return found
