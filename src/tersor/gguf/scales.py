"""First scales and minima of blocks, by weighted least squares over each sub-block by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.gguf.state import State, inverse, levels_of, nearest, to_half
from tersor.gguf.types.base import ScalarType

TRIALS = 16  # widths of a sub-block's levels that are tried
SUPER_TRIALS = 12  # of a block's


def first_state(kind: ScalarType, target: Tensor, weights: Tensor) -> State:
    """Return a state whose scales fit `target` (n, w) under weights (w,), and whose codes are the nearest."""
    n, width = target.shape
    parts, by_sub = target.reshape(n, -1, kind.sub), weights.reshape(1, -1, kind.sub)
    steps, floors = _shifted(kind, parts, by_sub) if kind.shifted else (_symmetric(kind, parts, by_sub), None)
    blocks = width // kind.block
    d, scales = _whole(steps, by_sub.sum(-1), kind.scales, blocks)
    zeros = torch.zeros_like(scales)
    dmin, mins = _whole(floors, by_sub.sum(-1), kind.mins, blocks) if floors is not None else (d * 0.0, zeros)
    state = State(torch.zeros_like(target, dtype=torch.uint8), d, scales, dmin, mins)
    return rounded(kind, target, state)


def rounded(kind: ScalarType, target: Tensor, state: State) -> State:
    """Return a state with the codes nearest to the target."""
    n, k = state.scales.shape
    scaled = (target.reshape(n, k, -1) + state.floors()[..., None]) * inverse(state.steps())[..., None]
    codes = nearest(kind, scaled).to(torch.uint8).reshape(target.shape)
    return State(codes, state.d, state.scales, state.dmin, state.mins)


def _shares(kind: ScalarType) -> list[float]:
    """Return what shares of the largest weight the levels are tried to reach."""
    low = {2: 0.45, 3: 0.55, 4: 0.75, 5: 0.85, 6: 0.92}.get((len(kind.levels) - 1).bit_length(), 0.97)
    return torch.linspace(low, 1.05, TRIALS).tolist()


def _symmetric(kind: ScalarType, parts: Tensor, weights: Tensor) -> Tensor:
    """Return the scales (n, k), of either sign, that fit sub-blocks (n, k, s) best."""
    levels = levels_of(kind, parts)
    peak = parts.abs().amax(-1)
    reach = float(max(-levels[0], levels[-1]))
    signs = (1.0,) if kind.scales is not None and kind.scales[0] >= 0 else (1.0, -1.0)
    best, found = torch.full_like(peak, -1.0), torch.zeros_like(peak)
    for sign in signs:
        for share in _shares(kind):
            step = sign * share * peak / reach
            level = levels[nearest(kind, parts * inverse(step)[..., None])]
            fit = (weights * parts * level).sum(-1)
            size = (weights * level * level).sum(-1)
            gain = torch.where(size > 0, fit * fit * inverse(size), 0.0)
            better = gain > best
            best, found = torch.where(better, gain, best), torch.where(better, fit * inverse(size), found)
    return found


def _shifted(kind: ScalarType, parts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
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
            level = nearest(kind, (parts + floor[..., None]) * inverse(step)[..., None]).to(torch.float32)
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


def _whole(wanted: Tensor, weights: Tensor, bounds: tuple[int, int] | None, blocks: int) -> tuple[Tensor, Tensor]:
    """Return block scales (n, g) and whole numbers (n, k) whose products are near the wanted scales (n, k)."""
    if bounds is None:
        return to_half(wanted), torch.ones_like(wanted)
    n = len(wanted)
    apart, heavy = wanted.reshape(n, blocks, -1), weights.expand(n, -1).reshape(n, blocks, -1)
    peak = apart.gather(-1, apart.abs().argmax(-1, keepdim=True))
    best, found = torch.full_like(peak, torch.inf), torch.zeros_like(peak)
    ends = [float(bound) for bound in bounds if bound]
    for end in ends:
        for trial in range(SUPER_TRIALS):
            d = to_half(peak / (end * (1.0 - 0.03 * trial)))
            whole = (apart * inverse(d)).round().clamp_(*bounds)
            error = (heavy * (apart - d * whole).square()).sum(-1, keepdim=True)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, d, found)
    whole = (apart * inverse(found)).round().clamp_(*bounds)
    return found[..., 0], whole.reshape(n, -1)
