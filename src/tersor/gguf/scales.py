"""First scales and minima of blocks, by weighted least squares over each sub-block by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.gguf.state import State, inverse, nearest, to_half
from tersor.gguf.types.base import CodedType
from tersor.gguf.types.words import GROUP, WordType
from tersor.gguf.wording import nearest_words

TRIALS = 16  # widths of a sub-block's levels that are tried
SUPER_TRIALS = 12  # of a block's


def first_state(kind: CodedType, target: Tensor, weights: Tensor) -> State:
    """Return a state whose scales fit `target` (n, w) under weights (w,); levels are still to be chosen."""
    n, width = target.shape
    parts, by_sub = target.reshape(n, -1, kind.sub), weights.reshape(1, -1, kind.sub)
    steps, floors = _shifted(kind, parts, by_sub) if kind.shifted else (_symmetric(kind, parts, by_sub), None)
    blocks = width // kind.block
    weight = by_sub.sum(-1)
    d, scales = (to_half(steps), torch.ones_like(steps)) if kind.scales is None else _whole(
        steps, weight, kind.whole, (blocks, kind.scales, kind.unit))
    if floors is None:
        dmin, mins = d * 0.0, scales * 0.0
    elif kind.mins is None:
        dmin, mins = to_half(floors), torch.ones_like(floors)
    else:
        bounds = kind.mins
        dmin, mins = _whole(floors, weight, lambda wanted: wanted.round().clamp(*bounds), (blocks, bounds, 1.0))
    return State(torch.zeros_like(target, dtype=torch.int8), d, scales, dmin, mins)


def rounded(kind: CodedType, target: Tensor, state: State) -> State:
    """Return a state with the levels nearest to the target."""
    n, k = state.scales.shape
    scaled = (target.reshape(n, k, -1) + state.floors()[..., None]) * inverse(state.steps())[..., None]
    found = nearest_words(kind, scaled.reshape(-1, GROUP), torch.eye(GROUP)) if isinstance(kind, WordType) else (
        nearest(kind, scaled))
    levels = found.to(torch.int8).reshape(target.shape)
    return State(levels, state.d, state.scales, state.dmin, state.mins)


def _shares(kind: CodedType) -> list[float]:
    """Return what shares of the largest weight the levels are tried to reach."""
    low = {2: 0.45, 3: 0.55, 4: 0.75, 5: 0.85, 6: 0.92}.get((len(kind.levels) - 1).bit_length(), 0.97)
    return torch.linspace(low, 1.05, TRIALS).tolist()


def _symmetric(kind: CodedType, parts: Tensor, weights: Tensor) -> Tensor:
    """Return the scales (n, k), of either sign, that fit sub-blocks (n, k, s) best."""
    if kind.scales is not None and kind.scales[0] > 0:  # levels without signs
        parts = parts.abs()
    peak = parts.abs().amax(-1)
    reach = float(max(-kind.levels[0], kind.levels[-1]))
    signs = (1.0,) if kind.scales is not None and kind.scales[0] >= 0 else (1.0, -1.0)
    best, found = torch.full_like(peak, -1.0), torch.zeros_like(peak)
    for sign in signs:
        for share in _shares(kind):
            step = sign * share * peak / reach
            level = nearest(kind, parts * inverse(step)[..., None])
            fit = (weights * parts * level).sum(-1)
            size = (weights * level * level).sum(-1)
            gain = torch.where(size > 0, fit * fit * inverse(size), 0.0)
            better = gain > best
            best, found = torch.where(better, gain, best), torch.where(better, fit * inverse(size), found)
    return found


def _shifted(kind: CodedType, parts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima (n, k), none negative where they are stored as whole numbers."""
    top = float(len(kind.levels) - 1)
    low, high = parts.amin(-1), parts.amax(-1)
    if kind.mins is not None:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    total, first = weights.sum(-1), (weights * parts).sum(-1)
    energy = (weights * parts * parts).sum(-1)
    best, steps, floors = torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)
    for share in _shares(kind):
        middle = (high + low) / 2
        step, floor = share * (high - low) / top, share * (high - low) / 2 - middle
        for _ in range(2):
            level = nearest(kind, (parts + floor[..., None]) * inverse(step)[..., None])
            cross, sums = (weights * level * parts).sum(-1), (weights * level).sum(-1)
            squares = (weights * level * level).sum(-1)
            step = (total * cross - first * sums) * inverse(total * squares - sums * sums)
            floor = (step * sums - first) / total
            if kind.mins is not None:
                alone = floor < 0
                step = torch.where(alone, cross * inverse(squares), step)
                floor = floor.clamp(min=0.0)
            error = energy + step * step * squares + floor * floor * total - 2 * (
                step * cross - floor * first + step * floor * sums)
            better = error < best
            best = torch.where(better, error, best)
            steps, floors = torch.where(better, step, steps), torch.where(better, floor, floors)
    return steps, floors


def _whole(wanted: Tensor, weights: Tensor, rounding: Callable[[Tensor], Tensor],
           shape: tuple[int, tuple[int, int], float]) -> tuple[Tensor, Tensor]:
    """Return block scales (n, g) and whole numbers (n, k) whose products are near the wanted scales (n, k).

    Parameters
    ----------
    rounding : callable
        Returns the nearest whole numbers.
    shape : (int, (int, int), float)
        Blocks, the bounds of whole numbers, and the unit of block scales.
    """
    n, (blocks, bounds, unit) = len(wanted), shape
    apart, heavy = wanted.reshape(n, blocks, -1), weights.expand(n, -1).reshape(n, blocks, -1)
    peak = apart.gather(-1, apart.abs().argmax(-1, keepdim=True))
    best, found = torch.full_like(peak, torch.inf), torch.zeros_like(peak)
    ends = [float(bound) for bound in bounds if abs(bound) > 1]
    for end in ends:
        for trial in range(SUPER_TRIALS):
            d = to_half(peak / (end * (1.0 - 0.03 * trial)), unit)
            whole = rounding(apart * inverse(d))
            error = (heavy * (apart - d * whole).square()).sum(-1, keepdim=True)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, d, found)
    whole = rounding(apart * inverse(found))
    return found[..., 0], whole.reshape(n, -1)
