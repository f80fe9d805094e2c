"""Spatially coupled sign bases: what a temperature wave along a chain of windows costs and gives (ADR 10).

    coupled.py [--device cuda] [--out FOLDER]      # a quarter of an hour on one core

A chain of L numbers has two sign bases: windows of W at 0, W, 2W, … in the first, shifted by W / 2 in the second (a
ring), each behind its own `H ε H`. Window j of the 2 L / W cools from `HOT` to `COLD` in `ramp` steps that begin at
step `delay j`. Windows whose ramp has not begun (hot), or is over (cold), are sampled every `ahead` and `behind` steps,
0 for never, as far as `reach` positions away. What counts is the mean number of sweeps a sign gets, `spent`: the plain
annealed code takes `two2x2` at as many sweeps, at 4,096. Plain torch; the levels are fitted per chain in the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
from tersor.numerics.linalg import sylvester

CHAINS, LENGTH = 16, 8192
LEVEL, HOT, COLD = 0.64, 0.10, 0.05
MINIMIZE = 30


@dataclasses.dataclass(frozen=True)
class Case:
    """One encoder; `ahead` and `behind` in steps between two samples of a window outside its ramp, 0: never."""

    window: int
    ramp: int
    delay: int
    ahead: int
    behind: int
    reach: int = 99

    @property
    def key(self) -> str:
        """The case's name in results."""
        return "coupled|" + "|".join(str(value) for value in dataclasses.astuple(self))

    def step(self, position: int, now: int) -> float | None:
        """Return how far a window's ramp is at step `now`, 0 to 1, or None where it is not sampled then."""
        share = (now - self.delay * position) / self.ramp
        if 0 <= share < 1:
            return share
        away = -share * self.ramp / self.delay if share < 0 else (share - 1) * self.ramp / self.delay
        period = self.ahead if share < 0 else self.behind
        if not period or away > self.reach or (now + position) % period:
            return None
        return min(max(share, 0.0), 1.0)


CASES = tuple(Case(512, *rest) for rest in (
    (300, 300, 1, 1), (300, 300, 0, 0), (300, 300, 1, 1, 2), (300, 300, 4, 4), (300, 300, 8, 8), (300, 300, 8, 8, 8),
    (1000, 300, 8, 8), (1000, 100, 8, 8)))


class Chain:
    """Signs of both bases of many chains, and what each contributes; windows first: (windows, chains, W)."""

    def __init__(self, target: Tensor, window: int, seed: int) -> None:
        self.count, self.half = target.shape[1] // window, window // 2
        self.generator = torch.Generator(device=target.device).manual_seed(seed)
        hadamard = torch.from_numpy(sylvester(window) / math.sqrt(window)).float()
        draw = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (2, self.count, window), generator=draw) * 2.0 - 1.0
        dense = (torch.einsum("ij,kj,jl->kil", hadamard, s, hadamard) for s in signs)
        self.maps = [one.to(target.device) for one in dense]
        self.targets = [self._windows(target), self._windows(target.roll(-self.half, 1))]
        shape = (self.count, len(target), window)
        self.signs = [LEVEL * (torch.randint(0, 2, shape, generator=self.generator, device=target.device) * 2.0 - 1.0)
                      for _ in range(2)]
        self.parts = [torch.bmm(s, m) for s, m in zip(self.signs, self.maps, strict=True)]

    def _windows(self, target: Tensor) -> Tensor:
        return target.reshape(len(target), self.count, -1).transpose(0, 1).contiguous()

    def _other(self, basis: int, windows: Tensor) -> Tensor:
        """Return what the other basis contributes to these windows."""
        part, half = self.parts[1 - basis], self.half
        if basis == 0:
            return torch.cat([part[(windows - 1) % self.count][:, :, half:], part[windows][:, :, :half]], 2)
        return torch.cat([part[windows][:, :, half:], part[(windows + 1) % self.count][:, :, :half]], 2)

    def sample(self, basis: int, windows: Tensor, temperature: Tensor) -> None:
        """Draw the signs of some windows of one basis, each window at its own temperature."""
        rest = self.targets[basis][windows] - self._other(basis, windows)
        field = torch.bmm(rest, self.maps[basis][windows])
        odds = torch.sigmoid(2 * LEVEL * field / temperature[:, None, None])
        uniform = torch.rand(odds.shape, generator=self.generator, device=odds.device)
        fresh = LEVEL * (2.0 * (uniform < odds) - 1.0)
        self.signs[basis][windows] = fresh
        self.parts[basis][windows] = torch.bmm(fresh, self.maps[basis][windows])

    def error(self, target: Tensor) -> float:
        """Return the mean squared error with the best levels of each chain."""
        first, second = (torch.bmm(torch.sign(s), m).transpose(0, 1).reshape(target.shape)
                         for s, m in zip(self.signs, self.maps, strict=True))
        columns = torch.stack([first, second.roll(self.half, 1)], -1)
        levels = torch.linalg.lstsq(columns, target.unsqueeze(-1)).solution
        return float((target - (columns @ levels).squeeze(-1)).square().mean())


def run(case: Case, device: str, seed: int) -> dict[str, Any]:
    """Return error, sweeps spent a sign, and seconds."""
    target = torch.randn(CHAINS, LENGTH, generator=torch.Generator().manual_seed(seed)).to(device)
    chain, began, spent = Chain(target, case.window, seed), time.perf_counter(), 0
    positions = 2 * chain.count
    for now in range(case.delay * (positions - 1) + case.ramp):
        for basis in range(2):
            shares = {k: case.step(2 * k + basis, now) for k in range(chain.count)}
            live = {k: HOT * (COLD / HOT) ** share for k, share in shares.items() if share is not None}
            if live:
                spent += len(live)
                chosen, heat = (torch.tensor(list(column), device=device) for column in (live, live.values()))
                chain.sample(basis, chosen, heat)
    every, cold = torch.arange(chain.count, device=device), torch.full((chain.count,), 1e-6, device=device)
    for _ in range(MINIMIZE):
        for basis in range(2):
            chain.sample(basis, every, cold)
    return {"relative_error": chain.error(target), "spent": spent / positions, "seconds": time.perf_counter() - began,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    common.RESULTS = arguments.out
    torch.set_num_threads(1)
    for case in CASES:
        numbers = run(case, arguments.device, 7)
        common.record("coupled", case, seed=7, nbytes=0, numbers=numbers)
        print(case, json.dumps(numbers), flush=True)


if __name__ == "__main__":
    main()
