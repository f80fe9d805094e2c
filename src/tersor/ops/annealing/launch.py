"""Annealed sampling on CUDA: factors, signs and temperatures for the kernel. See README.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.numerics import rng
from tersor.ops.annealing.kernels.anneal import anneal
from tersor.ops.annealing.problem import Bases, Draws, Schedule, unit_of
from tersor.ops.annealing.shapes import Tile, factors, tile_of

COLD = 16  # sweeps at the end that minimize


def sample(target: Tensor, bases: Bases, schedule: Schedule, draws: Draws, tile: Tile | None = None) -> Tensor:
    """Return codes uint8 (n, width) of the second basis after `schedule` and `COLD` sweeps that minimize.

    A vector's codes follow from it, the seed and its place in the matrix, not from the others beside it.
    """
    count, width = target.shape
    tile = tile or tile_of(width)
    assert tile is not None
    device = target.device
    left, back, right = factors(bases.rotation, tile, device)
    codes = torch.empty(count, width, dtype=torch.uint8, device=device)
    quads = -(-(schedule.sweeps + COLD) // 4)
    # the kernel takes log2(log2(e) / 2T) at the first sweep and its step
    log_start = math.log2(0.5 * math.log2(math.e) / schedule.temperature(0, unit_of(bases.second)))
    log_step = math.log2(schedule.start / schedule.stop) / max(1, schedule.sweeps - 1)
    with torch.cuda.device(device):
        anneal[(count,)](
            target.contiguous(), codes, rng.signs(bases.rotation.seed, 0, width).to(device),
            bases.kept.to(device, torch.float32), left, back, right, bases.first.to(device), bases.second.to(device),
            draws.seed & (2**63 - 1), draws.vector, schedule.sweeps, quads, log_start, log_step, tile.rows,
            tile.padded, tile.columns, len(bases.first), len(bases.second), left is back, not bool(bases.kept.all()),
            num_warps=tile.warps)
    return codes
