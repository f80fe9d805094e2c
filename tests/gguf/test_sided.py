"""Levels chosen with an eye on other rows: no step raises the cost, and blocks stay what their type can hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tersor.gguf.encode import Inputs, decode, encode
from tersor.gguf.sided import Across, sided
from tersor.gguf.solve import Metric, solve
from tersor.gguf.state import State
from tersor.gguf.types.base import CodedType
from tersor.gguf.types.ladder import LADDER, type_of
from tersor.numerics.linalg import inverse_cholesky
from tersor.numerics.sides import DAMPING, ROWS
from tersor.testing import gaussian
from tests.covering import covering

WIDTH, HEIGHT = 256, 48
NAMES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_1", "IQ2_XXS", "IQ3_S")  # of each way to hold scales and levels
EACH = pytest.mark.parametrize("name", NAMES)


def moments(width: int, seed: int) -> Tensor:
    x = gaussian((4 * width, width), seed) @ (torch.eye(width) + gaussian((width, width), seed + 1) / width**0.5)
    return x.T @ x / len(x)


def begun(kind: CodedType, hessian: Tensor) -> tuple[Tensor, State]:
    target = gaussian((HEIGHT, WIDTH))
    return target, solve(kind, target, Metric.of(inverse_cholesky(hessian)), 1)


def cost(target: Tensor, state: State, across: Across) -> float:
    """Return `tr(G E H Eᵀ)` as it is written."""
    error, side = (target - state.values()).double(), across.sides[0].double()
    damped = side / side.diagonal().mean() + DAMPING * torch.eye(len(side), dtype=torch.float64)
    return float(((damped @ error @ across.whole.double()) * error).sum())


@EACH
def test_every_sweep_lowers_the_cost(name: str) -> None:
    kind, hessian = type_of(name), moments(WIDTH, 3)
    target, state = begun(kind, hessian)
    across = Across.of(hessian, [moments(HEIGHT, 5)], 0)
    found = [sided(kind, target, state, dataclasses.replace(across, sweeps=sweeps)) for sweeps in range(3)]
    costs = [cost(target, one, across) for one in found]
    assert torch.equal(found[0].levels, state.levels)
    assert costs[1] < 0.97 * costs[0]
    assert costs[2] <= costs[1]
    for mine, theirs in zip(found[2].parts()[1:], state.parts()[1:], strict=True):
        assert torch.equal(mine, theirs)  # scales stay
    stored = kind.pack(found[2].fields(kind))
    torch.testing.assert_close(kind.decode(stored).reshape(HEIGHT, -1), found[2].values())


def test_one_row_alone_takes_the_best_level_there_is() -> None:
    """With one column that costs anything, and rows that do not meet, the nearest level is the best."""
    kind, target = type_of("Q3_K"), gaussian((3, WIDTH))
    state = begun(kind, torch.eye(WIDTH))[1]
    state = State(*(part[:3] for part in state.parts()))
    found = sided(kind, target, state, Across(torch.eye(WIDTH), [torch.eye(3)], 1))
    steps = state.steps().repeat_interleave(kind.sub, 1)
    assert bool(((target - found.values()).abs() <= steps.abs() / 2 + 1e-6)[
        (found.levels > kind.levels[0]) & (found.levels < kind.levels[-1])].all())


@pytest.mark.parametrize("name", covering(NAMES, [kind.name for kind in LADDER]))
def test_bytes_hold_what_was_chosen(name: str) -> None:
    """By all types: fewer errors as the loss sees them, from the bytes themselves."""
    kind = type_of(name)
    matrix, hessian, side = gaussian((HEIGHT, 2 * WIDTH)), moments(2 * WIDTH, 3), moments(HEIGHT, 5)
    inputs, across = Inputs.of(hessian), Across.of(hessian, [side], 1)
    errors = [matrix - decode(kind, encode(kind, matrix, inputs, 0, given), 2 * WIDTH) for given in (None, across)]
    alone, together = (float(((side @ error @ hessian) * error).sum()) for error in errors)
    assert together < alone


def test_rows_of_many_blocks_are_those_of_each() -> None:
    kind, width, rows = type_of("Q4_1"), 64, ROWS + 40
    hessian, matrix, sides = moments(width, 3), gaussian((rows, width)), [moments(ROWS, 5), moments(40, 6)]
    inputs = Inputs.of(hessian)
    whole = encode(kind, matrix, inputs, 0, Across.of(hessian, sides, 1))
    last = encode(kind, matrix[ROWS:], inputs, 0, Across.of(hessian, sides[1:], 1))
    assert (whole[ROWS:] == last).float().mean() > 0.99  # sums of another order
    flat = encode(kind, matrix, inputs, 0, Across.of(hessian, [sides[0], torch.zeros(40, 40)], 1))
    assert torch.equal(flat[ROWS:], encode(kind, matrix[ROWS:], inputs, 0))  # no gradients, no moves
