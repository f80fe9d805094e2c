"""Joint choice of small-alphabet codes in two bases by annealed block Gibbs sampling.

For unit-variance vectors `y` and an orthogonal P, find codes s and t of small alphabets so that `y ≈ a[s] + Pᵀ b[t]`.
Given t, the best s is exact and separable, and likewise t; a sweep samples both with probabilities
`exp(-error² / 2T)` while T falls geometrically, then plain minimization ends it. Ours (docs/codecs/two_basis.md);
relatives: superposition codes, and simulated annealing of Kirkpatrick, Gelatt, Vecchi (Science 220, 1983).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.ops import annealing
from tersor.ops.annealing.problem import Bases, Draws, Schedule
from tersor.payload.codes import mirrored

MINIMIZE = 30  # rounds of plain minimization after the last sweep
EXACT = 4  # the same after the kernel, which has minimized in half precision
BLOCK_FLOATS = 1 << 20  # numbers annealed together on a processor: what its cache holds
DEVICE_FLOATS = 1 << 22  # on a GPU in plain torch; the kernel takes all that it is given


def anneal(target: Tensor, bases: Bases, schedule: Schedule, seed: int, place: int = 0) -> tuple[Tensor, Tensor]:
    """Return codes uint8 (n, width) of both bases for unit-variance vectors `target`, float32 (n, width).

    Codes of the second basis where `kept` is False are meaningless. `place` is that of the first vector in its matrix:
    random numbers depend on it.
    """
    first, second = [], []
    fused = annealing.fused(target)
    floats = target.numel() if fused else DEVICE_FLOATS if target.is_cuda else BLOCK_FLOATS
    step = max(1, floats // target.shape[1])
    for start in range(0, len(target), step):
        block = target[start : start + step]
        t = annealing.sample(block, bases, schedule, Draws(seed, place, start))
        s, t = minimize(block, bases, t, EXACT if fused else MINIMIZE)
        first.append(s)
        second.append(t)
    return torch.cat(first), torch.cat(second)


def minimize(target: Tensor, bases: Bases, t: Tensor, rounds: int = MINIMIZE) -> tuple[Tensor, Tensor]:
    """Return codes after `rounds` of alternating exact minimization, starting from those of the second basis."""
    first, second = (levels.to(target.device) for levels in (bases.first, bases.second))
    kept = bases.kept.to(target.device)
    edges = (first[1:] + first[:-1]) / 2, (second[1:] + second[:-1]) / 2
    s = t
    for _ in range(rounds):
        s = torch.bucketize(target - bases.spread(second[t.to(torch.int32)] * kept), edges[0], out_int32=True)
        t = torch.bucketize(bases.gather(target - first[s]), edges[1], out_int32=True)
    s = torch.bucketize(target - bases.spread(second[t.to(torch.int32)] * kept), edges[0], out_int32=True)
    return s.to(torch.uint8), t.to(torch.uint8)


def fit_levels(target: Tensor, bases: Bases, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least-squares levels of both alphabets for fixed codes, symmetric about 0, float32."""
    columns = [_signed(bases.first, s), _signed(bases.second, t)]
    second = [bases.spread(part * bases.kept.to(part.device)) for part in columns[1]]
    parts = [*columns[0], *second]
    gram = torch.tensor([[float((a * b).sum(dtype=torch.float64)) for b in parts] for a in parts], dtype=torch.float64)
    right = torch.tensor([float((a * target).sum(dtype=torch.float64)) for a in parts], dtype=torch.float64)
    gram += 1e-9 * max(1.0, float(gram.diagonal().max())) * torch.eye(len(parts), dtype=torch.float64)
    solved = torch.linalg.solve(gram, right).to(torch.float32)
    count = len(columns[0])
    return mirrored(solved[:count], len(bases.first)), mirrored(solved[count:], len(bases.second))


def _signed(levels: Tensor, codes: Tensor) -> list[Tensor]:
    """Return, for each pair of opposite levels from the innermost, a tensor of +1, -1 and 0: where it stands."""
    count = len(levels)
    wide = codes.to(torch.int32)
    return [(wide == count - 1 - k).to(torch.float32) - (wide == k).to(torch.float32)
            for k in range(count // 2 - 1, -1, -1)]


def standard_levels(count: int, power: float) -> Tensor:
    """Return equally spaced symmetric levels of mean square `power`."""
    levels = torch.arange(count, dtype=torch.float32) - (count - 1) / 2
    return levels * math.sqrt(power / float(levels.square().mean()))
