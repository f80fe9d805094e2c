"""Train filters of linear trellis codes for the beams that will encode them, for the unit normal.

    python tools/train_beam.py 2,2:24@256 3,3:32@1024 --seconds 150 --device cuda --out OUT

trains two filters side by side, a process each: new bits by phase, bits of the window, survivors, or `@all` for all
states of windows up to 16 bits. Each begins with the packaged filters of its rate, small random taps behind their own
(or those of a file of `--start` as well).

Paths that a beam finds for fresh numbers give normal equations, and those a direction: from a filter's taps to the taps
of least squares. Steps along it have momentum, since paths follow the taps: where one step would end is far from where
many do. A population steps on the same numbers; again and again, the worst half become changed copies of the best, and
there are ever fewer. The last part of the time goes to the best two alone, with smaller steps, and to their means.

Progress is printed, errors on `VALIDATED` fresh segments that are always the same. OUT/NAME.json holds the best taps so
far, so nothing is lost where time is cut. Several GPUs share the processes out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.windows import every_window
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_path import bits_of, states
from tersor.ops.trellis_path.beam import Sums, entering
from tersor.ops.trellis_path.shapes import Steps

LENGTH = 256
POPULATION = 8
VALIDATED = 2048
MOMENTUM, STEP = 0.9, 0.5
DAMPING = 1e-5
FADING = 0.85  # of random taps, from bit to bit
AVERAGED = 0.95  # of the mean of taps, from step to step
TURN = 12  # steps between two choices
SETTLED = 0.15  # of the time, before which none is chosen: paths have to follow first


@dataclasses.dataclass(frozen=True)
class Goal:
    """What to train: new bits by phase, bits of the window, survivors, or None for all states; and of how many."""

    shifts: tuple[int, ...]
    memory: int
    width: int | None
    population: int

    @classmethod
    def parsed(cls, text: str) -> Goal:
        """Return the goal that `2,2:24@256`, or, with other than 8 candidates, `2,2:24@256/12` names."""
        shifts, rest = text.split(":")
        memory, _, rest = rest.partition("@")
        width, _, population = rest.partition("/")
        return cls(tuple(map(int, shifts.split(","))), int(memory), None if width == "all" else int(width),
                   int(population or POPULATION))

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{'-'.join(map(str, self.shifts))}x{self.memory}{'' if self.width is None else f'b{self.width}'}"

    @property
    def rate(self) -> float:
        """Bits a number."""
        return sum(self.shifts) / len(self.shifts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train: segments of a step, seconds in all, of them the part of the last ones alone, where."""

    segments: int
    seconds: float
    device: str
    alone: float = 0.35

    def of(self, width: int | None) -> int:
        """Return the segments of a step with so many survivors: the fewer, the more programs run at a time."""
        wanted = max(self.segments // 2, self.segments * 1024 // (width or 256))
        return self.segments if self.device == "cpu" else wanted


@dataclasses.dataclass
class Candidate:
    """A filter on its way: taps, what they move by, their mean, and the error of the last turn; float64 on a device."""

    taps: Tensor
    velocity: Tensor
    mean: Tensor
    error: float = float("inf")

    @classmethod
    def at(cls, taps: Tensor) -> Candidate:
        """Return one that stands still."""
        return cls(taps.clone(), torch.zeros_like(taps), taps.clone())


def windows_of(taps: Tensor, numbers: Tensor, goal: Goal, width: int | None) -> list[Tensor]:
    """Return the windows, as signs (n, numbers of a phase, memory), that an encoder finds for segments, by phase."""
    steps = Steps(goal.memory, goal.shifts, linear=True)
    if width is None:
        ages = torch.arange(goal.memory, device=numbers.device)
        table = taps.to(torch.float32) @ (every_window(goal.memory).to(numbers.device, torch.float32) * 2 - 1)
        path = states(numbers, table, steps)
        return [(path[:, phase :: len(taps), None] >> ages & 1).to(torch.float64) * 2 - 1 for phase in range(len(taps))]
    places, phases, _ = Line(LENGTH, goal.shifts, goal.memory).windows(LENGTH)
    found = entering(numbers, Sums(steps, taps.cpu()), width)
    signs = bits_of(found, goal.shifts).to(torch.float64).mul_(2).sub_(1)
    return [signs[:, places[phases == phase].to(signs.device)] for phase in range(len(taps))]


def equations(taps: Tensor, numbers: Tensor, goal: Goal, width: int | None) -> tuple[float, Tensor, Tensor]:
    """Return the error of taps (period, memory) on segments, and the normal equations of the paths found, by phase."""
    grams, mets, error = [], [], torch.zeros((), dtype=torch.float64, device=taps.device)
    for phase, found in enumerate(windows_of(taps, numbers, goal, width)):
        windows = found.flatten(0, 1)
        target = numbers[:, phase :: len(taps)].reshape(-1).to(torch.float64)
        error += (windows @ taps[phase] - target).square().sum()
        grams.append(windows.T @ windows / len(windows))
        mets.append(windows.T @ target / len(windows))
    return float(error / numbers.to(torch.float64).square().sum()), torch.stack(grams), torch.stack(mets)


def stepped(one: Candidate, numbers: Tensor, goal: Goal, step: float) -> float:
    """Move a candidate towards the taps of least squares for its own paths; return the error before."""
    error, grams, mets = equations(one.taps, numbers, goal, goal.width)
    damped = grams + DAMPING * torch.eye(goal.memory, dtype=torch.float64, device=grams.device)
    aim = torch.linalg.solve(damped, mets[..., None])[..., 0]
    one.velocity = MOMENTUM * one.velocity + aim - one.taps
    one.taps = one.taps + step * one.velocity
    one.mean = AVERAGED * one.mean + (1 - AVERAGED) * one.taps
    return error


def changed(taps: Tensor, drawn: torch.Generator) -> Tensor:
    """Return a changed copy of taps: noise on some, of a size that varies; at times two taps in each other's place."""
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=drawn, dtype=torch.float64)

    size = 10 ** float(uniform(1) * 1.7 - 2.2)
    few = uniform(*taps.shape) < (1.0 if uniform(1) < 0.5 else 0.25)
    noise = torch.randn(taps.shape, generator=drawn, dtype=torch.float64)
    relative = taps.abs().cpu() + 0.1
    made = taps.cpu() + size * noise * few * relative
    if uniform(1) < 0.3:
        phase, i, j = (int(torch.randint(n, (1,), generator=drawn)) for n in (len(taps), *2 * (taps.shape[1],)))
        made[phase, [i, j]] = made[phase, [j, i]]
    return made.to(taps.device)


def begun(goal: Goal, known: list[Tensor], count: int, drawn: torch.Generator) -> list[Tensor]:
    """Return taps to begin with: known ones, cut or with random taps behind them; changed copies; random ones."""
    found = []
    for turn in range(count):
        own = known[turn % len(known)]
        own = own.repeat(len(goal.shifts) // len(own), 1)[:, : goal.memory]
        size = (0.02, 0.005, 0.05, 0.1)[turn // len(known) % 4]
        taps = size * torch.randn(len(goal.shifts), goal.memory, generator=drawn, dtype=torch.float64)
        taps[:, : own.shape[1]] = own if turn < len(known) else changed(own, drawn)
        if turn >= 4 * len(known):
            taps = torch.randn(taps.shape, generator=drawn, dtype=torch.float64) * FADING ** torch.arange(goal.memory)
        found.append(taps)
    return found


def known_of(goal: Goal, files: list[Path]) -> list[Tensor]:
    """Return taps of the goal's rate, float64 (period, memory), those of the longest windows first."""
    found = [(code.shifts, code.taps_tensor()) for code in filters().values() if code.memory >= min(goal.memory, 16)]
    for file in files:
        held = json.loads(file.read_text())
        found += [(tuple(held["shifts"]), torch.tensor(held["taps"], dtype=torch.float64))]
    mine = [taps for shifts, taps in found if shifts * (len(goal.shifts) // len(shifts)) == goal.shifts]
    return sorted(mine, key=lambda taps: -taps.shape[1])


class Trainer:
    """One goal's training: where it stands, and what it writes down."""

    def __init__(self, goal: Goal, plan: Plan, known: list[Tensor], out: Path) -> None:
        self.goal, self.plan, self.out = goal, plan, out
        self.drawn = torch.Generator().manual_seed(goal.memory)
        self.normal = torch.Generator(plan.device).manual_seed(7)
        self.begin, self.best = time.perf_counter(), (float("inf"), torch.zeros(0))
        count = VALIDATED if plan.device != "cpu" else 4 * plan.segments
        self.validation = torch.randn(count, LENGTH, generator=torch.Generator().manual_seed(1)).to(plan.device)
        taps = begun(goal, known, goal.population, self.drawn)
        self.candidates = [Candidate.at(one.to(plan.device)) for one in taps]
        self.steps = 0

    @property
    def passed(self) -> float:
        """The part of the time that has passed."""
        return (time.perf_counter() - self.begin) / self.plan.seconds

    def judge(self, taps: Tensor, note: str) -> float:
        """Return the error on the validation numbers; the best taps are written down."""
        error = equations(taps, self.validation, self.goal, self.goal.width)[0]
        if error < self.best[0]:
            self.best = error, taps.clone()
            held = {"shifts": self.goal.shifts, "width": self.goal.width, "error": error,
                    "taps": [[round(float(tap), 5) for tap in phase] for phase in taps]}
            (self.out / f"{self.goal.name}.json").write_text(json.dumps(held))
        print(f"{self.goal.name} {self.passed * self.plan.seconds:5.0f} s {self.steps:5} steps {note} {error:.5f} best "
              f"{self.best[0]:.5f}", flush=True)
        return error

    def turn(self, step: float, times: int = 1) -> None:
        """Let all candidates make some steps on the same numbers."""
        sums = [0.0] * len(self.candidates)
        for i in range(TURN):
            count = times * self.plan.of(self.goal.width)
            numbers = torch.randn(count, LENGTH, generator=self.normal, device=self.plan.device)
            for place, one in enumerate(self.candidates):
                error = stepped(one, numbers, self.goal, step)
                self.steps += 1
                sums[place] += error if 2 * i >= TURN else 0.0
                if self.passed >= 1:
                    return
        for one, error in zip(self.candidates, sums, strict=True):
            one.error = error / (TURN // 2)

    def run(self) -> None:
        """Train until time is up."""
        together, last = 1 - self.plan.alone, 0.0
        self.judge(self.candidates[0].taps, "begin")
        while self.passed < together and len(self.candidates) > 1:
            self.turn(STEP)
            self.candidates.sort(key=lambda one: one.error)
            if self.passed > last + 0.1:
                self.judge(self.candidates[0].mean, f"of {len(self.candidates)}")
                last = self.passed
            if self.passed > SETTLED:
                self.choose(1 - self.passed / together)
        self.candidates = self.candidates[:2]
        while self.passed < 1:
            left = (1 - self.passed) / self.plan.alone
            self.turn(STEP * max(0.1, min(1.0, left)), 2)
            if self.passed > min(last + 0.04, 1):
                last = self.passed
                for i, one in enumerate(self.candidates):
                    self.judge(one.mean, f"alone {i}")
        self.close()

    def choose(self, left: float) -> None:
        """Put changed copies of the best in the place of the worst half; the population shrinks with the time left."""
        kept = self.candidates[: max(1, len(self.candidates) // 2)]
        count = max(2, round(self.goal.population * left)) - len(kept)
        copies = [Candidate.at(changed(one.taps, self.drawn)) for one in kept[: max(0, count)]]
        self.candidates = kept + copies

    def close(self) -> None:
        """Print the error of the best taps under other beams."""
        for width in sorted({256, 1024, 2048, 4096} - {self.goal.width}):
            if width << max(self.goal.shifts) <= 1 << 14 and self.plan.device != "cpu":
                error = equations(self.best[1], self.validation, self.goal, width)[0]
                print(f"{self.goal.name} with {width}: {error:.5f}", flush=True)


def _train(place: int, goals: list[Goal], plan: Plan, files: list[Path], out: Path) -> None:
    torch.set_num_threads(1)
    if plan.device == "cuda":
        device = f"cuda:{place % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        plan = dataclasses.replace(plan, device=device)
    goal = goals[place]
    Trainer(goal, plan, known_of(goal, files), out).run()


def main() -> None:
    """Train all goals, a process each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goals", nargs="+", type=Goal.parsed, help="such as 2,2:24@256")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--segments", type=int, default=264, help="of a step: two programs a multiprocessor")
    parser.add_argument("--start", type=Path, action="append", default=[], help="a file that this wrote")
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    plan = Plan(given.segments, given.seconds, given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    every = [context.Process(target=_train, args=(place, given.goals, plan, given.start, given.out))
             for place in range(len(given.goals))]
    for one in every:
        one.start()
    for one in every:
        one.join()
    raise SystemExit(int(any(one.exitcode for one in every)))


if __name__ == "__main__":
    main()
