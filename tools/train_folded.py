"""Find folded codes of trellises for the unit normal: evolution over whole numbers, on a processor or a GPU.

    python tools/train_folded.py SHIFTS MEMORY --seconds 120 --device cuda --population 64 --sequences 96

Every candidate of a generation codes the same fresh numbers, with Viterbi's algorithm (windows to 16 bits, 15 on a GPU)
or a beam (`--width`); the best quarter stays, the others are changed copies of it. The first ones follow Ungerboeck's
rule: numbers whose windows differ only in the newest bits, or only in the oldest, lie as far apart as they can; those
of `--start` are packaged codes of these shifts, of this memory or less. At the end least squares fit the curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

import torch
from torch import Tensor

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.angles import CURVE, FOLD, SLOPE, Folded, bent, folded, terms
from tersor.codecs.trellis.windows import every_window
from tersor.ops.trellis_path import Steps

LENGTH = 256
FINAL = 768  # segments that the finalists code
DIGITS = 4  # bits of the window beyond its two newest and two oldest digits, where rules shall leave some freedom


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to search: candidates of a generation, segments that each codes, the width of a beam, and where."""

    population: int
    sequences: int
    width: int | None
    device: str

    def normal(self, count: int, drawn: torch.Generator) -> Tensor:
        """Return fresh segments (count, LENGTH)."""
        return torch.randn(count, LENGTH, generator=drawn).to(self.device)

    def signs(self, code: Folded, numbers: Tensor) -> Tensor:
        """Return the signs of the streams that encode segments."""
        return viterbi.encode(code, numbers, self.width).to(torch.float32) * 2 - 1

    def error(self, code: Folded, numbers: Tensor) -> float:
        """Return the relative error of a code on segments (n, length)."""
        gap = code.numbers(self.signs(code, numbers), numbers.shape[1]) - numbers
        return float(gap.square().mean() / numbers.square().mean())

    def errors(self, codes: list[Folded], numbers: Tensor) -> list[float]:
        """Return the errors of codes; on a GPU in one launch."""
        if numbers.is_cuda and self.width is None:
            return _errors_at_once(codes, numbers)
        return [self.error(code, numbers) for code in codes]


def _errors_at_once(codes: list[Folded], numbers: Tensor) -> list[float]:
    from tersor.ops.trellis_path import launch

    one, count, device = codes[0], len(numbers), numbers.device
    turns = torch.tensor([code.turns for code in codes], dtype=torch.float64, device=device)
    angles = (turns @ every_window(one.memory).to(device, torch.float64)).to(torch.int64) & (1 << FOLD) - 1
    curves = torch.stack([bent(code.curve) for code in codes]).to(device)
    tables = curves[torch.arange(len(codes), device=device)[:, None, None], angles]
    found = launch.states(numbers.repeat(len(codes), 1), tables, Steps(one.memory, one.shifts))
    phases = torch.arange(LENGTH, device=device) % len(one.shifts)
    owner = torch.arange(len(codes), device=device).repeat_interleave(count)
    gap = tables[owner[:, None], phases, found] - numbers.repeat(len(codes), 1)
    return (gap.square().unflatten(0, (-1, count)).mean((1, 2)) / numbers.square().mean()).tolist()


def first(shifts: tuple[int, ...], memory: int, drawn: torch.Generator) -> Folded:
    """Return a random code whose numbers differ most where only the newest or only the oldest bits do."""
    whole = 1 << FOLD
    turns = torch.randint(whole, (len(shifts), memory), generator=drawn)
    for phase, new in enumerate(shifts):
        old = shifts[(phase + 1) % len(shifts)]
        own = turns[phase]
        if memory >= 2 * (new + old) + DIGITS:
            for i in range(new):  # the second newest bits decide the second digit, whatever they do to the first
                own[new + i] = own[new + i] // (whole >> new) * (whole >> new) + (whole >> 2 * new << i)
            for i in range(old):
                place = memory - 1 - old - i
                own[place] = own[place] // (whole >> old) * (whole >> old) + (whole >> old + 1 + i)
        for i in range(new):
            own[i] = whole >> new << i
        for i in range(old):
            own[memory - 1 - i] = whole >> 1 + i
    return Folded(shifts, tuple(map(tuple, turns.tolist())), CURVE)


def longer(code: Folded, memory: int, drawn: torch.Generator) -> Folded:
    """Return a code of a longer window: random turns come in between its bits, the oldest stay the oldest."""
    extra = memory - code.memory
    place = int(torch.randint(2, code.memory - 1, (1,), generator=drawn))
    more = torch.randint(1 << FOLD, (len(code.shifts), extra), generator=drawn).tolist()
    return dataclasses.replace(code, turns=tuple((*own[:place], *new, *own[place:])
                                                 for own, new in zip(code.turns, more, strict=True)))


def changed(code: Folded, drawn: torch.Generator) -> Folded:
    """Return a copy of which one to three turns are others."""
    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=drawn))

    turns = [list(phase) for phase in code.turns]
    for _ in range(1 + below(3)):
        own, place, kind = turns[below(len(turns))], below(code.memory), below(4)
        if kind == 0:
            own[place] = below(1 << FOLD)
        elif kind == 1:
            own[place] ^= 1 << below(FOLD)
        elif kind == 2:
            own[place] = int(own[place] + 2000 * torch.randn(1, generator=drawn)) % (1 << FOLD)
        else:
            other = below(code.memory)
            own[place], own[other] = own[other], own[place]
    return dataclasses.replace(code, turns=tuple(map(tuple, turns)))


def fitted(code: Folded, numbers: Tensor, plan: Plan) -> Folded:
    """Return the code with a curve that suits the numbers better that are coded with it."""
    centred, weighed = terms(code.angles(plan.signs(code, numbers), numbers.shape[1]).cpu())
    basis = (centred * weighed).flatten(1).to(torch.float64).T * 2.0 ** -(2 * FOLD + SLOPE)
    found = torch.linalg.lstsq(basis, numbers.cpu().flatten()[:, None].to(torch.float64)).solution[:, 0]
    kept = 0.5 * found + 0.5 * torch.tensor(code.curve, dtype=torch.float64)
    return dataclasses.replace(code, curve=tuple(round(one) for one in kept.tolist()))


def search(codes: list[Folded], seconds: float, drawn: torch.Generator, plan: Plan) -> Folded:
    """Return the best of all that is found."""
    ends, parents = time.perf_counter() + seconds, plan.population // 4
    kept = codes[:parents]
    while time.perf_counter() < ends:
        scores = plan.errors(codes, plan.normal(plan.sequences, drawn))
        order = sorted(range(len(codes)), key=scores.__getitem__)
        kept = [codes[i] for i in order[:parents]]
        codes = kept + [changed(one, drawn) for one in kept for _ in range(3)]
    scores = plan.errors(kept, plan.normal(FINAL, drawn))
    kept = [kept[i] for i in sorted(range(len(kept)), key=scores.__getitem__)[:3]]
    for _ in range(4):
        kept = [fitted(one, plan.normal(FINAL // 2, drawn), plan) for one in kept]
    numbers = plan.normal(FINAL, drawn)
    return min(kept, key=lambda one: plan.error(one, numbers))


def main() -> None:
    """Print the code found and its error on fresh numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shifts", help="new bits a step, such as 1,2")
    parser.add_argument("memory", type=int)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--population", type=int, default=24)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--width", type=int, help="of a beam instead of Viterbi's algorithm")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    shifts = tuple(map(int, given.shifts.split(",")))
    drawn = torch.Generator().manual_seed(given.seed)
    plan = Plan(given.population, given.sequences, given.width, given.device)
    start = [first(shifts, given.memory, drawn) for _ in range(2 * plan.population)]
    known = [one for one in folded().values() if given.start and one.shifts == shifts and one.memory <= given.memory]
    for one in known:
        start += [one if one.memory == given.memory else longer(one, given.memory, drawn) for _ in range(8)]
    code = search(start, given.seconds, drawn, plan)
    error = plan.error(code, plan.normal(2 * FINAL, torch.Generator().manual_seed(1)))
    print(json.dumps({"shifts": shifts, "error": error, "turns": code.turns, "curve": code.curve}))


if __name__ == "__main__":
    main()
