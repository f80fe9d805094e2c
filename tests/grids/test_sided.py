"""Levels chosen with an eye on other rows: no step raises the cost, and rows that do not meet are chosen as before."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tersor.grids.scheme import Scheme
from tersor.grids.sided import sided
from tersor.grids.solve import Effort, Metric, descended, solve
from tersor.grids.state import State
from tersor.numerics.sides import DAMPING, ROWS, parted
from tersor.testing import gaussian

WIDTH, HEIGHT = 160, 96


def moments(width: int, seed: int) -> Tensor:
    x = gaussian((4 * width, width), seed) @ (torch.eye(width) + gaussian((width, width), seed + 1) / width**0.5)
    return x.T @ x / len(x)


def begun(scheme: Scheme) -> tuple[Tensor, Metric, State]:
    target, metric = gaussian((HEIGHT, WIDTH)), Metric.of(moments(WIDTH, 3))
    return target, metric, solve(scheme, target, metric, Effort(1, 1), torch.bfloat16)


def cost(target: Tensor, state: State, metric: Metric, side: Tensor) -> float:
    error = (target - state.values()).double()
    damped = side.double() / side.double().diagonal().mean() + DAMPING * torch.eye(len(side), dtype=torch.float64)
    return float(((damped @ error @ metric.whole.double()) * error).sum())


@pytest.mark.parametrize("name", ["w2g32", "w3c", "w4g32a"])
def test_every_sweep_lowers_the_cost(name: str) -> None:
    scheme = Scheme.parse(name)
    target, metric, state = begun(scheme)
    side = moments(HEIGHT, 5)
    costs = [cost(target, sided(scheme, target, state, metric.whole, [side], sweeps), metric, side)
             for sweeps in range(4)]
    assert costs[0] == pytest.approx(cost(target, state, metric, side))
    assert costs[1] < 0.95 * costs[0]
    assert costs[3] <= costs[2] <= costs[1]
    found = sided(scheme, target, state, metric.whole, [side], 1)
    assert int(found.levels.min()) >= scheme.low
    assert int(found.levels.max()) <= scheme.high
    assert torch.equal(found.scales, state.scales)


def test_rows_that_do_not_meet_are_chosen_as_before() -> None:
    scheme = Scheme.parse("w3g32")
    target, metric, state = begun(scheme)
    worse = dataclasses.replace(state, levels=torch.zeros_like(state.levels))
    expected = descended(scheme, target, worse, metric).levels
    found = sided(scheme, target, worse, metric.whole, [torch.eye(HEIGHT)], 1).levels
    assert (found == expected).float().mean() > 0.999  # sums of another order
    halves = [side.clone() for side in (torch.eye(HEIGHT // 2), torch.eye(HEIGHT // 2))]
    assert (sided(scheme, target, worse, metric.whole, halves, 1).levels == expected).float().mean() > 0.999


def test_blocks_of_rows_without_gradients_stay() -> None:
    scheme = Scheme.parse("w3g32")
    target, metric, state = begun(scheme)
    found = sided(scheme, target, state, metric.whole, [moments(64, 5), torch.zeros(32, 32)], 1)
    assert torch.equal(found.levels[64:], state.levels[64:])
    assert not torch.equal(found.levels[:64], state.levels[:64])


def test_blocks_cover_all_rows() -> None:
    assert parted(2 * ROWS + 3) == [ROWS, ROWS, 3]
    assert parted(7) == [7]
