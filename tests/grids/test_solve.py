"""Levels and scales: feedback against a slow reference, steps that may not raise the error, optima by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersor.grids.encode import decode, encode
from tersor.grids.first import first
from tersor.grids.refit import refit
from tersor.grids.scheme import Scheme
from tersor.grids.solve import Effort, Metric, descended, fed_back, solve
from tersor.grids.state import State
from tersor.testing import gaussian

SCHEMES = [Scheme.parse(name) for name in ("w2g32", "w3g64a", "w4c", "w8g32a")]
BF16 = torch.bfloat16
SLACK = 1e-4  # sums of float32: a step that leaves the error as it is may seem to raise it by so much


def correlated(width: int, seed: int = 7) -> Tensor:
    x = gaussian((4 * width, width), seed) @ (torch.eye(width) + 0.5 * gaussian((width, width), seed + 1) / width**0.5)
    x *= torch.linspace(0.5, 3, width)
    return x.T @ x / len(x)


def started(scheme: Scheme, rows: int = 12, width: int = 192) -> tuple[Tensor, Metric, State]:
    target, metric = gaussian((rows, width)), Metric.of(correlated(width))
    return target, metric, fed_back(scheme, target, first(scheme, target, metric.weights, BF16), metric)


def slow_feedback(scheme: Scheme, target: Tensor, state: State, hessian: Tensor) -> Tensor:
    """Column by column: what is not yet rounded is set to what is best for the errors made so far."""
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = damped.diagonal().argsort(descending=True, stable=True).tolist()
    size, work = scheme.size(target.shape[1]), target.double()
    levels = torch.zeros(target.shape, dtype=torch.float64)
    for turn, column in enumerate(order):
        scale, zero = state.scales[:, column // size].double(), state.zeros[:, column // size].double()
        levels[:, column] = (work[:, column] / scale + zero).round().clamp(scheme.low, scheme.high)
        value = (levels[:, column] - zero) * scale
        done, later = order[: turn + 1], order[turn + 1 :]
        work[:, column] = value
        if later:
            error = target[:, done].double() - work[:, done]
            moved = torch.linalg.solve(damped[later][:, later], damped[later][:, done] @ error.T).T
            work[:, later] = target[:, later].double() + moved
    return levels


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_feedback_is_the_slow_reference(scheme: Scheme) -> None:
    target, hessian = gaussian((6, 64)), correlated(64)
    metric = Metric.of(hessian)
    begun = first(scheme, target, metric.weights, BF16)
    found = fed_back(scheme, target, begun, metric).levels.double()
    expected = slow_feedback(scheme, target, begun, hessian)
    assert float((found != expected).float().mean()) <= 0.02  # float32 sums may turn a number that is halfway


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_no_step_raises_the_error(scheme: Scheme) -> None:
    target, metric, state = started(scheme)
    costs = [metric.cost(target - state.values())]
    for _ in range(3):
        state = descended(scheme, target, state, metric)
        costs.append(metric.cost(target - state.values()))
        state = refit(scheme, target, state, metric.whole, BF16)
        costs.append(metric.cost(target - state.values()))
        assert int(state.levels.min()) >= scheme.low
        assert int(state.levels.max()) <= scheme.high
        assert torch.equal(state.scales, state.scales.to(BF16).float())
        assert bool((state.zeros >= scheme.low).all() and (state.zeros <= scheme.high).all())
    for before, after in itertools.pairwise(costs):
        assert bool((after <= before * (1 + SLACK)).all())
    assert float(costs[-1].sum()) < (0.97 if scheme.bits < 8 else 1) * float(costs[0].sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_levels_end_where_no_single_one_can_be_better(scheme: Scheme) -> None:
    target, metric, state = started(scheme, 4, 64)
    for _ in range(30):
        state = descended(scheme, target, state, metric)
    least = metric.cost(target - state.values())
    for column in range(64):
        for turn in (-1, 1):
            other = state.levels.clone()
            other[:, column] = (other[:, column].int() + turn).clamp(scheme.low, scheme.high)
            cost = metric.cost(target - State(other, state.scales, state.zeros).values())
            assert bool((cost >= least * (1 - SLACK)).all())


@pytest.mark.parametrize("name", ["w3c", "w3ca"])
def test_a_refit_is_the_best_scale_and_zero(name: str) -> None:
    """One group a row: all zeros are tried, and of each the scale of least squares; stored in float32 for once."""
    scheme = Scheme.parse(name)
    target, metric, state = started(scheme, 8, 32)
    for _ in range(8):
        state = refit(scheme, target, state, metric.whole, torch.float32)
    found, h = metric.cost(target - state.values()), metric.whole.double()
    zeros = range(scheme.low, scheme.high + 1) if not scheme.symmetric else (0,)
    best = torch.full((8,), torch.inf, dtype=torch.float64)
    for zero in zeros:
        line = state.levels.double() - zero
        scale = ((target.double() @ h) * line).sum(1) / ((line @ h) * line).sum(1)
        error = target.double() - scale[:, None] * line
        best = torch.minimum(best, ((error @ h) * error).sum(1))
    assert bool((found <= best * (1 + SLACK)).all())


def test_each_effort_is_at_least_as_good() -> None:
    scheme = Scheme.parse("w2g64")
    target, metric = gaussian((64, 256)), Metric.of(correlated(256))
    costs = [float(metric.cost(target - solve(scheme, target, metric, Effort(rounds, sweeps), BF16).values()).sum())
             for rounds, sweeps in ((0, 0), (2, 2), (6, 4))]
    plain = encode(scheme, target, None, Effort(0, 0))
    costs.insert(0, float(metric.cost(target - decode(scheme, plain, 256)).sum()))
    assert costs[1] < 0.8 * costs[0]  # feedback
    assert costs[2] < 0.92 * costs[1]
    assert costs[3] < costs[2]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("rows", [1, 45])
def test_tensors_are_those_of_the_layout(scheme: Scheme, rows: int) -> None:
    matrix = gaussian((rows, 192))
    found = encode(scheme, matrix, Metric.of(correlated(192)), Effort(1, 1))
    layout = scheme.layout((rows, 192))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in layout.items()}
    error = (matrix - decode(scheme, found, 192)).square().mean() / matrix.square().mean()
    assert float(error) < 2.0 * 4.0 ** -(scheme.bits - 1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_odd_matrices_decode_to_finite_numbers(scheme: Scheme) -> None:
    zero, large = torch.zeros(4, 192), torch.full((4, 192), 3e38)
    one = torch.zeros(4, 192)
    one[:, 5] = 1e-30
    silent = torch.zeros(192, 192)
    for matrix, hessian in itertools.product((zero, large, one), (correlated(192), silent, None)):
        metric = None if hessian is None else Metric.of(hessian)
        found = decode(scheme, encode(scheme, matrix, metric, Effort(1, 1)), 192)
        assert bool(torch.isfinite(found).all())
        if matrix is zero:
            assert not found.any()


def test_threads_do_not_change_bytes() -> None:
    scheme, matrix, hessian = Scheme.parse("w3g64a"), gaussian((96, 256)), correlated(256)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(encode(scheme, matrix, Metric.of(hessian), Effort(1, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
