"""Find folded filters of trellis codes for the unit normal: evolution over whole numbers, on any device.

    python tools/train_folded.py SHIFTS MEMORY --seconds 120

Every candidate of a generation codes the same fresh numbers with Viterbi's algorithm (windows to 16 bits) or a beam;
the best quarter stays, the others are changed copies of it. The first ones follow Ungerboeck's rule: numbers whose
windows differ only in the newest bits, or only in the oldest, lie as far apart as they can. At the end the curve is
fitted by least squares. Numbers are drawn anew for every generation, from a generator of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

import torch
from torch import Tensor

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.angles import CURVE, FOLD, SLOPE, Folded, terms

LENGTH = 256
PARENTS, POPULATION = 6, 24
FINAL = 768  # segments that the finalists code


def error(code: Folded, numbers: Tensor, width: int | None = None) -> float:
    """Return the relative error of a code on segments (n, length)."""
    return float((decoded(code, numbers, width) - numbers).square().mean() / numbers.square().mean())


def decoded(code: Folded, numbers: Tensor, width: int | None) -> Tensor:
    """Return what segments decode to."""
    return code.numbers(signs(code, numbers, width), numbers.shape[1])


def signs(code: Folded, numbers: Tensor, width: int | None) -> Tensor:
    """Return the signs of the streams that encode segments."""
    del width
    return viterbi.encode(code, numbers).to(torch.float32) * 2 - 1


def first(shifts: tuple[int, ...], memory: int, drawn: torch.Generator) -> Folded:
    """Return a random code whose numbers differ most where only the newest or only the oldest bits do."""
    whole = 1 << FOLD
    turns = torch.randint(whole, (len(shifts), memory), generator=drawn)
    for phase, new in enumerate(shifts):
        old = shifts[(phase + 1) % len(shifts)]
        own = turns[phase]
        if memory >= 2 * (new + old):
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


def fitted(code: Folded, numbers: Tensor, width: int | None) -> Folded:
    """Return the code with the curve that suits the numbers best that are coded with it."""
    centred, weighed = terms(code.angles(signs(code, numbers, width), numbers.shape[1]))
    basis = (centred * weighed).flatten(1).to(torch.float64).T * 2.0 ** -(2 * FOLD + SLOPE)
    found = torch.linalg.lstsq(basis, numbers.flatten()[:, None].to(torch.float64)).solution[:, 0]
    kept = 0.5 * found + 0.5 * torch.tensor(code.curve, dtype=torch.float64)
    return dataclasses.replace(code, curve=tuple(round(one) for one in kept.tolist()))


def search(code: list[Folded], seconds: float, drawn: torch.Generator, sequences: int, width: int | None) -> Folded:
    """Return the best of all that is found."""
    def normal(count: int) -> Tensor:
        return torch.randn(count, LENGTH, generator=drawn)

    ends, kept = time.perf_counter() + seconds, code
    while time.perf_counter() < ends:
        numbers = normal(sequences)
        scores = [error(one, numbers, width) for one in code]
        order = sorted(range(len(code)), key=scores.__getitem__)
        kept = [code[i] for i in order[:PARENTS]]
        code = kept + [changed(one, drawn) for one in kept for _ in range(POPULATION // PARENTS - 1)]
    for _ in range(4):
        numbers = normal(FINAL // 2)
        kept = [fitted(one, numbers, width) for one in kept]
    numbers = normal(FINAL)
    return min(kept, key=lambda one: error(one, numbers, width))


def main() -> None:
    """Print the code found and its error on fresh numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shifts", help="new bits a step, such as 1,2")
    parser.add_argument("memory", type=int)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--width", type=int, help="of a beam instead of Viterbi's algorithm")
    given = parser.parse_args()
    shifts = tuple(map(int, given.shifts.split(",")))
    drawn = torch.Generator().manual_seed(given.seed)
    start = [first(shifts, given.memory, drawn) for _ in range(2 * POPULATION)]
    code = search(start, given.seconds, drawn, given.sequences, given.width)
    numbers = torch.randn(FINAL, LENGTH, generator=torch.Generator().manual_seed(1))
    print(json.dumps({"shifts": shifts, "error": error(code, numbers, given.width), "turns": code.turns,
                      "curve": code.curve}))


if __name__ == "__main__":
    main()
