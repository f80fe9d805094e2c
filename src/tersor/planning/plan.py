"""One byte budget over many matrices: choices measured by a survey, the picks that cost least, and plans as JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError
from tersor.registry import parse

EXACT_LIMIT = 400  # matrices up to which the dynamic program runs; beyond, one hull step is a negligible gap
_CELLS = 6e8  # work of the dynamic program: matrices x choices x budget units
_UNITS = 200_000

Plan: TypeAlias = Mapping[str, Codec]
TEMPER = 0.5  # the power of a weight an element that a plan goes by; docs/log.md
C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Choice(Generic[C]):
    """One codec tried on one matrix.

    Attributes
    ----------
    codec : Codec, or another way to store a matrix
    nbytes : int
        Stored bytes.
    distortion : float
        What the plan minimizes the sum of: usually relative distortion times the matrix's sensitivity.
    """

    codec: C
    nbytes: int
    distortion: float


def frontier(choices: Sequence[Choice[C]]) -> list[Choice[C]]:
    """Return the choices that no other beats in both bytes and distortion, by rising bytes."""
    kept: list[Choice[C]] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.distortion)):
        if not kept or choice.distortion < kept[-1].distortion:
            kept.append(choice)
    return kept


def spend(choices: Mapping[str, Sequence[Choice[C]]], budget: int) -> dict[str, Choice[C]]:
    """Pick one choice a matrix so that the bytes stay within `budget` and the distortions sum to the least.

    A multiple-choice knapsack: solved by dynamic programming over bytes for up to `EXACT_LIMIT` matrices (exact up to
    the rounding of bytes to budget units), by the Lagrangian on the convex hull beyond that; what either leaves over is
    then spent on the best single upgrades.

    Raises
    ------
    BudgetError
        If the cheapest choices together exceed the budget; `least_bytes` are those of the cheapest choices.
    """
    names = list(choices)
    fronts = [frontier(choices[name]) for name in names]
    if not all(fronts):
        raise CodecConfigError("every matrix needs at least one choice; run the survey again")
    least = sum(front[0].nbytes for front in fronts)
    if least > budget:
        raise BudgetError(f"the budget of {budget} bytes is below the least reachable {least} bytes", least)
    picks = _dynamic(fronts, budget - least) if len(fronts) <= EXACT_LIMIT else _hull_greedy(fronts, budget - least)
    _spend_rest(fronts, picks, budget)
    return {name: front[pick] for name, front, pick in zip(names, fronts, picks, strict=True)}


def _dynamic(fronts: Sequence[Sequence[Choice[Any]]], spare: int) -> list[int]:
    total = sum(len(front) for front in fronts)
    cells = int(max(1000, min(_UNITS, _CELLS / total, spare))) if spare else 1
    unit = max(1, -(-spare // cells))
    size = spare // unit + 1
    best = np.zeros(size)
    taken = np.zeros((len(fronts), size), dtype=np.uint16)
    for row, front in enumerate(fronts):
        new = np.full(size, np.inf)
        for position, choice in enumerate(front):
            shift = -(-(choice.nbytes - front[0].nbytes) // unit)
            if shift >= size:
                continue
            reached = best[: size - shift] + choice.distortion
            better = reached < new[shift:]
            new[shift:][better] = reached[better]
            taken[row, shift:][better] = position
        best = new
    picks, place = [0] * len(fronts), size - 1
    for row in range(len(fronts) - 1, -1, -1):
        picks[row] = int(taken[row, place])
        front = fronts[row]
        place -= -(-(front[picks[row]].nbytes - front[0].nbytes) // unit)
    return picks


def _hull_greedy(fronts: Sequence[Sequence[Choice[Any]]], spare: int) -> list[int]:
    """Take the steps of all convex hulls in order of distortion saved per byte while they fit."""
    steps: list[tuple[float, int, int, int]] = []
    for row, front in enumerate(fronts):
        at = 0
        while at + 1 < len(front):
            slopes = [(front[at].distortion - c.distortion) / (c.nbytes - front[at].nbytes) for c in front[at + 1 :]]
            to = at + 1 + max(range(len(slopes)), key=slopes.__getitem__)
            steps.append((-max(slopes), row, to, front[to].nbytes - front[at].nbytes))
            at = to
    picks = [0] * len(fronts)
    stopped: set[int] = set()
    for _, row, to, cost in sorted(steps, key=lambda step: step[0]):
        if row in stopped or cost > spare:
            stopped.add(row)
            continue
        picks[row], spare = to, spare - cost
    return picks


def _spend_rest(fronts: Sequence[Sequence[Choice[Any]]], picks: list[int], budget: int) -> None:
    """Take the single upgrade that saves the most distortion and fits, until none does; in place."""
    rest = budget - sum(front[pick].nbytes for front, pick in zip(fronts, picks, strict=True))
    while True:
        best = (0.0, -1, -1)
        for row, front in enumerate(fronts):
            now = front[picks[row]]
            for to in range(picks[row] + 1, len(front)):
                if front[to].nbytes - now.nbytes <= rest:
                    best = max(best, (now.distortion - front[to].distortion, row, to))
        if best[1] < 0:
            return
        _, row, to = best
        rest -= fronts[row][to].nbytes - fronts[row][picks[row]].nbytes
        picks[row] = to


def to_json(plan: Plan) -> dict[str, str]:
    """Return a plan as matrix name to factory string, for people to read and edit."""
    return {name: codec.spec() for name, codec in plan.items()}


def from_json(record: Any) -> dict[str, Codec]:
    """Return the plan of a JSON object; the inverse of `to_json`.

    Raises
    ------
    CodecConfigError, UnknownCodecError
        If it is no object of factory strings.
    """
    if not isinstance(record, dict) or not all(isinstance(v, str) for v in record.values()):
        raise CodecConfigError("a plan must be a JSON object of matrix names and codec strings")
    return {name: parse(text) for name, text in record.items()}


def tempered(weights: Mapping[str, float], elements: Mapping[str, int]) -> dict[str, float]:
    """Return weights whose ratios, an element, are those given to the power `TEMPER`; their sum stays.

    A weight is measured by small errors on little text. Errors of few bits are large, and what they cost grows more
    slowly: plans that take weights at their word give too much to what seems to matter most, and starve the rest.

    Parameters
    ----------
    weights : mapping of str to float
        What a matrix's relative distortion costs, >= 0.
    elements : mapping of str to int
        Of the same matrices.
    """
    whole = sum(weights.values())
    if not whole > 0:
        return dict(weights)
    made = {name: elements[name] * (weight / elements[name]) ** TEMPER for name, weight in weights.items()}
    share = whole / sum(made.values())
    return {name: share * weight for name, weight in made.items()}


def check_weights(names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights given by hand, checked.

    Raises
    ------
    CodecConfigError
        If a weight names no matrix, or is not a finite number >= 0.
    """
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise CodecConfigError(f"sensitivities name no matrix of this model: {unknown[:4]}")
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
            raise CodecConfigError(f"sensitivity of '{name}' must be a finite number >= 0, found {weight!r}")
    return {name: float(weight) for name, weight in weights.items()}
