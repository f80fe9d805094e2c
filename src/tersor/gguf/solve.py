"""One span of columns: levels by error feedback inside it, scales fitted again, the better of all tries by row."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.refit import Refit
from tersor.gguf.scales import first_state, rounded
from tersor.gguf.state import State, inverse, nearest
from tersor.gguf.types.base import CodedType
from tersor.gguf.types.words import WordType
from tersor.gguf.wording import worded


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """What errors in a span cost: `e H eᵀ`.

    Attributes
    ----------
    upper : Tensor
        (w, w), upper triangular, `upperᵀ upper = H⁻¹`.
    whole : Tensor
        H itself.
    """

    upper: Tensor
    whole: Tensor

    @classmethod
    def of(cls, upper: Tensor) -> Metric:
        """Return the metric of an inverse's factor."""
        unit = torch.eye(len(upper), dtype=torch.float64, device=upper.device)
        back = torch.linalg.solve_triangular(upper.to(torch.float64), unit, upper=True)
        return cls(upper, (back @ back.T).to(torch.float32))

    @property
    def weights(self) -> Tensor:
        """What the error of each column costs once later columns make up for it, (w,)."""
        return self.upper.diagonal().square().reciprocal()

    def cost(self, error: Tensor) -> Tensor:
        """Return the cost (n,) of errors (n, w)."""
        return ((error @ self.whole) * error).sum(1)


def solve(kind: CodedType, target: Tensor, metric: Metric, rounds: int) -> State:
    """Return a state near `target` (n, w): first scales, feedback, then rounds of fitting and feedback."""
    best = fed_back(kind, target, first_state(kind, target, metric.weights), metric)
    least = metric.cost(target - best.values())
    state = best
    for _ in range(rounds):
        fitted = Refit(kind, target, metric.whole, state).run()
        state = fed_back(kind, target, fitted, metric)
        for one in (fitted, state):
            cost = metric.cost(target - one.values())
            best = one.where(cost < least, best)
            least = torch.minimum(cost, least)
    return best


def fed_back(kind: CodedType, target: Tensor, state: State, metric: Metric) -> State:
    """Return the levels that a state's scales give from left to right, each column's error pushed onto later ones."""
    if isinstance(kind, WordType):
        return dataclasses.replace(state, levels=worded(kind, target, state.steps(), metric.upper))
    upper, work = metric.upper, target.T.contiguous()
    levels = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    steps, floors = state.steps().T.contiguous(), state.floors().T.contiguous()
    over = inverse(steps)
    for sub in range(len(steps)):
        start, stop = sub * kind.sub, (sub + 1) * kind.sub
        errors = torch.empty(kind.sub, work.shape[1], device=work.device)
        for column in range(start, stop):
            level = nearest(kind, (work[column] + floors[sub]) * over[sub])
            levels[column] = level.to(torch.int8)
            error = (work[column] - (steps[sub] * level - floors[sub])) / upper[column, column]
            errors[column - start] = error
            work[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return dataclasses.replace(state, levels=levels.T.contiguous())


def plainly(kind: CodedType, target: Tensor, weights: Tensor, rounds: int) -> State:
    """Return a state near `target` where errors of different columns do not make up for one another."""
    best = state = rounded(kind, target, first_state(kind, target, weights))
    metric = torch.diag(weights)
    least = (weights * (target - best.values()).square()).sum(1)
    for _ in range(rounds):
        state = rounded(kind, target, Refit(kind, target, metric, state).run())
        cost = (weights * (target - state.values()).square()).sum(1)
        best = state.where(cost < least, best)
        least = torch.minimum(cost, least)
    return best
