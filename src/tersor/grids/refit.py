"""Scales and zeros fitted again to levels, group by group, under the whole metric: no step raises the error."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.grids.scheme import Scheme
from tersor.grids.state import State, inverse, stored


def refit(scheme: Scheme, target: Tensor, state: State, metric: Tensor, dtype: torch.dtype) -> State:
    """Return a state with the same levels, whose groups have been given the best scale, and zero, one after another.

    Parameters
    ----------
    target : Tensor
        (n, w).
    metric : Tensor
        (w, w): errors e cost `e metric eᵀ`.
    """
    scales, zeros = state.scales.clone(), state.zeros.clone()
    pull = (target - state.values()) @ metric
    size = target.shape[1] // scales.shape[1]
    turns = (0.0,) if scheme.symmetric else (0.0, -1.0, 1.0)
    for group in range(scales.shape[1]):
        place = slice(group * size, (group + 1) * size)
        own, now, zero = metric[place, place], scales[:, group], zeros[:, group]
        level = state.levels[:, place].to(torch.float32) - zero[:, None]
        bent = level @ own
        sums = (pull[:, place] * level).sum(1), pull[:, place].sum(1), (bent * level).sum(1), bent.sum(1), own.sum()
        best, scale, turn = torch.zeros_like(now), now, torch.zeros_like(now)
        for shift in turns:
            found, cost = _scale(now, sums, shift, dtype)
            allowed = (zero + shift >= scheme.low) & (zero + shift <= scheme.high) & (cost < best)
            best = torch.where(allowed, cost, best)
            scale = torch.where(allowed, found, scale)
            turn = torch.where(allowed, shift, turn)
        change = (scale - now)[:, None] * level - (scale * turn)[:, None]
        pull -= change @ metric[place]
        scales[:, group], zeros[:, group] = scale, zero + turn
    return State(state.levels, scales, zeros)


def _scale(now: Tensor, sums: tuple[Tensor, ...], shift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the best scale (n,) of a group whose zero is moved by `shift`, and by how much the cost then changes."""
    along, flat, power, cross, mass = sums
    along = along - shift * flat  # of the pull, with the levels as they then are
    both = power - shift * cross
    new = power - 2 * shift * cross + shift * shift * mass
    scale = stored((along + now * both) * inverse(new), dtype)
    moved = scale * scale * new - 2 * scale * now * both + now * now * power
    return scale, moved - 2 * (scale * along - now * sums[0])
