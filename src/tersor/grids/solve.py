"""A matrix into a scheme: feedback from column to column, then levels and scales in turn, each the best for the others.

Errors cost `e H eᵀ`, H being the second moments of the inputs. Feedback (GPTQ, Frantar et al. 2023) gives a first
choice of levels. After it, each level is chosen anew with all others fixed (coordinate descent, as QuantEase, Behdin et
al. 2023), and so is each scale: no such step can raise the error. Each row keeps the best that it has seen.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.grids.first import first
from tersor.grids.refit import refit
from tersor.grids.scheme import Scheme
from tersor.grids.state import State, inverse, nearest
from tersor.numerics.linalg import inverse_cholesky

BLOCK = 128  # columns whose mutual corrections are applied one by one before the rest is updated at once


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """What errors cost.

    Attributes
    ----------
    whole : Tensor
        (w, w): H, damped.
    order : Tensor
        (w,): columns by falling mean square of their inputs; the dearest are rounded first.
    upper : Tensor
        (w, w), in that order: upper triangular, `upperᵀ upper = H⁻¹`.
    """

    whole: Tensor
    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: float = 0.01) -> Metric:
        """Return the metric of `E[x xᵀ]` (w, w)."""
        whole = hessian.to(torch.float32, copy=True)
        whole.diagonal().add_(damping * float(whole.diagonal().mean(dtype=torch.float64)))
        order = whole.diagonal().argsort(descending=True, stable=True)
        return cls(whole, order, inverse_cholesky(hessian[order][:, order], damping))

    @property
    def weights(self) -> Tensor:
        """What the error of each column costs once later columns make up for it, (w,)."""
        found = torch.empty_like(self.upper[0])
        found[self.order] = self.upper.diagonal().square().reciprocal()
        return found

    def cost(self, error: Tensor) -> Tensor:
        """Return the cost (n,) of errors (n, w)."""
        return ((error @ self.whole) * error).sum(1)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to look.

    Attributes
    ----------
    rounds : int
        Of scales, feedback and levels in turn.
    sweeps : int
        Over all levels in a round.
    across : int
        Over all levels at the end, where it is known how errors of different rows add up.
    """

    rounds: int
    sweeps: int
    across: int = 0


def solve(scheme: Scheme, target: Tensor, metric: Metric, effort: Effort, dtype: torch.dtype) -> State:
    """Return a state near `target` (n, w); scales are numbers of `dtype`."""
    state = fed_back(scheme, target, first(scheme, target, metric.weights, dtype), metric)
    best, least = state, metric.cost(target - state.values())
    for _ in range(effort.rounds):
        for _ in range(effort.sweeps):
            state = descended(scheme, target, state, metric)
            state = refit(scheme, target, state, metric.whole, dtype)
        best, least = _better(target, metric, state, best, least)
        state = fed_back(scheme, target, state, metric)
    if effort.rounds:
        state = descended(scheme, target, state, metric)
    return _better(target, metric, state, best, least)[0]


def _better(target: Tensor, metric: Metric, state: State, best: State, least: Tensor) -> tuple[State, Tensor]:
    cost = metric.cost(target - state.values())
    return state.where(cost < least, best), torch.minimum(cost, least)


def fed_back(scheme: Scheme, target: Tensor, state: State, metric: Metric) -> State:
    """Return the levels that a state's scales give in the metric's order, each error pushed onto later columns."""
    order, upper = metric.order, metric.upper
    work = target.T[order]
    group = order // (target.shape[1] // state.scales.shape[1])
    steps, zeros = state.scales.T.contiguous(), state.zeros.T.contiguous()
    over = inverse(steps)
    levels = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    places = list(zip(order.tolist(), group.tolist(), strict=True))
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = torch.empty(stop - start, work.shape[1], device=work.device)
        for column in range(start, stop):
            place, own = places[column]
            level = nearest(scheme, work[column] * over[own] + zeros[own])
            levels[place] = level.to(torch.int8)
            error = (work[column] - (level - zeros[own]) * steps[own]) / upper[column, column]
            errors[column - start] = error
            work[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return dataclasses.replace(state, levels=levels.T.contiguous())


def descended(scheme: Scheme, target: Tensor, state: State, metric: Metric) -> State:
    """Return the levels after each, from left to right, was chosen anew with all others fixed."""
    whole = metric.whole
    pull = whole @ (target - state.values()).T  # half of what the cost falls by along each weight, (w, n)
    steps = state.scales.T.contiguous()
    size = target.shape[1] // len(steps)
    levels = state.levels.T.to(torch.float32)
    for start in range(0, len(pull), BLOCK):
        stop = min(start + BLOCK, len(pull))
        moved = torch.empty(stop - start, pull.shape[1], device=pull.device)
        for column in range(start, stop):
            step = steps[column // size]
            level = nearest(scheme, levels[column] + pull[column] * inverse(step) / whole[column, column])
            change = (level - levels[column]) * step
            levels[column], moved[column - start] = level, change
            pull[column + 1 : stop].addr_(whole[column + 1 : stop, column], change, alpha=-1)
        pull[stop:].addmm_(whole[stop:, start:stop], moved, alpha=-1)
    return dataclasses.replace(state, levels=levels.to(torch.int8).T.contiguous())


def plainly(scheme: Scheme, target: Tensor, weights: Tensor, dtype: torch.dtype) -> State:
    """Return a state near `target` (n, w) where errors of different columns do not make up for one another."""
    state = first(scheme, target, weights, dtype)
    apart = target.reshape(*state.scales.shape, -1)
    levels = nearest(scheme, apart * inverse(state.scales)[..., None] + state.zeros[..., None])
    return dataclasses.replace(state, levels=levels.to(torch.int8).reshape(target.shape))
