"""Annealed sampling in plain torch: what the kernel means."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.annealing.problem import Bases, Draws, Schedule, pick, unit_of


def sample(target: Tensor, bases: Bases, schedule: Schedule, draws: Draws) -> Tensor:
    """Return codes uint8 (n, width) of the second basis after `schedule`; draws from a generator of its own."""
    device = target.device
    generator = torch.Generator(device=device).manual_seed(draws.mixed)
    first, second, kept = (x.to(device) for x in (bases.first, bases.second, bases.kept))
    uniform, unit = torch.empty_like(target), unit_of(second)
    v = pick(torch.zeros_like(target), second, 1.0, uniform.uniform_(generator=generator)) * kept
    for sweep in range(schedule.sweeps):
        temperature = schedule.temperature(sweep, unit)
        u = pick(target - bases.spread(v), first, temperature, uniform.uniform_(generator=generator))
        v = pick(bases.gather(target - u), second, temperature, uniform.uniform_(generator=generator)).mul_(kept)
    return torch.bucketize(v, (second[1:] + second[:-1]) / 2).to(torch.uint8)
