"""Find filters of linear trellis codes for the unit normal: evolution, best paths, and least squares for the taps.

    python tools/train_trellis.py SHIFTS MEMORY --seconds 60 --start src/tersor/data/trellis.json

Every candidate of a generation codes the same fresh numbers; its taps are then those of least squares for its own
paths. The best quarter stays, the others are changed copies of it. Needs a GPU that Triton supports.
`tools/train_beam.py` then improves what is found, and trains windows that beams encode.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from tersor.ops.trellis_path.shapes import Steps

LENGTH = 256
POPULATION, SEQUENCES, ROUNDS = 64, 96, 3


def tables(taps: Tensor) -> Tensor:
    """Return the number of every window, float32 (n, period, 2**memory), of taps (n, period, memory)."""
    memory = taps.shape[-1]
    index = torch.arange(1 << memory, device=taps.device)
    signs = ((index[None] >> torch.arange(memory, device=taps.device)[:, None] & 1) * 2 - 1).to(torch.float32)
    return taps.to(torch.float32) @ signs


def fit(taps: Tensor, numbers: Tensor, shifts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the taps of least squares for the paths that `taps` lead to, and the errors before and after them."""
    from tersor.ops.trellis_path.launch import states

    count, period, memory = taps.shape
    found = states(numbers.repeat(count, 1), tables(taps), Steps(memory, shifts, linear=True)).unflatten(0, (count, -1))
    ages = torch.arange(memory, device=taps.device)
    damping = 1e-3 * torch.eye(memory, device=taps.device, dtype=torch.float64)
    fitted = torch.empty_like(taps)
    error = torch.zeros(count, device=taps.device)
    for phase in range(period):
        signs = ((found[:, :, phase::period, None] >> ages & 1) * 2 - 1).flatten(1, 2).to(torch.float32)
        target = numbers[:, phase::period].flatten()
        gram = (signs.mT @ signs).to(torch.float64) + damping
        fitted[:, phase] = torch.linalg.solve(gram, (signs.mT @ target).to(torch.float64)).to(taps.dtype)
        made = (signs @ fitted[:, phase, :, None].to(torch.float32))[..., 0]
        error += (target - made).square().mean(1) / period
    return fitted, error / numbers.square().mean()


def changed(taps: Tensor, generator: torch.Generator) -> Tensor:
    """Return changed copies of taps (n, period, memory)."""
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=taps.device, dtype=taps.dtype)

    size = 10 ** (uniform(len(taps), 1, 1) * 2 - 2.3)
    noise = torch.randn(taps.shape, generator=generator, device=taps.device, dtype=taps.dtype)
    few = uniform(*taps.shape) < torch.where(uniform(len(taps), 1, 1) < 0.5, 1.0, 0.25)
    flips = torch.where((uniform(*taps.shape) < 0.04) & (uniform(len(taps), 1, 1) < 0.3), -1.0, 1.0)
    return (taps + size * noise * few) * flips


def search(shifts: tuple[int, ...], memory: int, start: list[list[list[float]]], seconds: float, seed: int) -> Tensor:
    """Return the best taps found, float64 (period, memory)."""
    device, period = "cuda", len(shifts)
    generator = torch.Generator(device).manual_seed(seed)
    taps = 0.5 * torch.randn(POPULATION, period, memory, generator=generator, device=device, dtype=torch.float64)
    for place, known in enumerate(start[: POPULATION // 2]):
        given = torch.tensor(known, dtype=torch.float64, device=device)
        given = given.repeat(period // len(given), 1)[:, :memory]
        taps[place] = 0.02 * taps[place]
        taps[place, :, : given.shape[1]] = given
    ends = time.perf_counter() + seconds
    score = torch.full((POPULATION,), torch.inf, device=device)
    while time.perf_counter() < ends:
        numbers = torch.randn(SEQUENCES, LENGTH, generator=generator, device=device)
        for _ in range(ROUNDS):
            taps, score = fit(taps, numbers, shifts)
        best = taps[score.argsort()[: POPULATION // 4]]
        copies = changed(best.repeat(3, 1, 1), generator)
        taps = torch.cat([best, copies])
    for _ in range(12):  # the finalists, on many more numbers
        numbers = torch.randn(8 * SEQUENCES, LENGTH, generator=generator, device=device)
        fresh, score = fit(taps[:8], numbers, shifts)
        taps = torch.cat([0.5 * taps[:8] + 0.5 * fresh])
    return taps[score.argmin()]


def distortion(taps: Tensor, shifts: tuple[int, ...], count: int = 8192, seed: int = 1) -> float:
    """Return the relative error of taps (period, memory) on fresh segments."""
    from tersor.ops.trellis_path.launch import states

    numbers = torch.randn(count, LENGTH, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    table = tables(taps[None])
    found = states(numbers, table, Steps(taps.shape[1], shifts, linear=True))
    phases = torch.arange(LENGTH, device="cuda") % len(shifts)
    decoded = table[0, phases[None].expand_as(found), found]
    return float((decoded - numbers).square().mean() / numbers.square().mean())


def main() -> None:
    """Print the taps found and their error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shifts", help="new bits a step, such as 2,3")
    parser.add_argument("memory", type=int)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path)
    given = parser.parse_args()
    shifts = tuple(map(int, given.shifts.split(",")))
    known = [] if given.start is None else json.loads(given.start.read_text())["filters"]
    start = [one["taps"] for one in known if sum(one["shifts"]) * len(shifts) == sum(shifts) * len(one["shifts"])]
    taps = search(shifts, given.memory, start, given.seconds, given.seed)
    print(json.dumps({"shifts": shifts, "error": distortion(taps, shifts),
                      "taps": [[round(float(tap), 5) for tap in phase] for phase in taps]}))


if __name__ == "__main__":
    main()
