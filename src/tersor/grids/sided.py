"""Levels once more, now that errors of different rows make up for one another too.

A model suffers from errors E by `tr(G E H Eᵀ)`, about: see `numerics.sides`. Columns are taken one after another, and
in each the rows by classes: a class moves where all of its moves together lower the cost.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.grids.scheme import Scheme
from tersor.grids.solve import BLOCK
from tersor.grids.state import State, inverse, nearest
from tersor.numerics.sides import Blocks, classes, damped, laid, levels_of


def sided(scheme: Scheme, target: Tensor, state: State, whole: Tensor, sides: Blocks, sweeps: int) -> State:
    """Return a state of the same scales whose levels were chosen anew.

    Parameters
    ----------
    target : Tensor
        (n, w).
    whole : Tensor
        (w, w): H, damped.
    sides : sequence of Tensor
        The blocks of G, (r, r) each; the last may be smaller.
    """
    levels, steps = laid(state.levels, sides), laid(state.scales, sides)
    aim = laid(target - dataclasses.replace(state, levels=torch.zeros_like(state.levels)).values(), sides)
    weighed = damped(sides)
    for _ in range(sweeps):
        _sweep(scheme, levels, (aim, steps), whole, weighed)
    return dataclasses.replace(state, levels=levels_of(levels, len(target)))


def _sweep(scheme: Scheme, levels: Tensor, given: tuple[Tensor, Tensor], whole: Tensor, sides: Tensor) -> None:
    """Choose the levels (w, b, r) of b blocks of rows anew, column by column and class by class; no step waits."""
    aim, steps = given
    group = len(aim) // len(steps)
    error = aim - levels * steps.repeat_interleave(group, 0)
    pull = torch.einsum("bij,cbj->cbi", sides, (whole @ error.flatten(1)).reshape(error.shape)).contiguous()
    parts = classes(sides)
    over, own, costs = inverse(steps), inverse(sides.diagonal(dim1=1, dim2=2)), inverse(whole.diagonal())
    for start in range(0, len(pull), BLOCK):
        stop = min(start + BLOCK, len(pull))
        moved = torch.empty(stop - start, *pull.shape[1:], device=pull.device)
        for column in range(start, stop):
            now, held, step = pull[column].clone(), levels[column], steps[column // group]
            share = over[column // group] * own * costs[column]
            for rows, part in parts:
                level = nearest(scheme, held[:, rows] + now[:, rows] * share[:, rows])
                change = (level - held[:, rows]) * step[:, rows]
                bent = whole[column, column] * torch.bmm(part, change[..., None])[..., 0]
                taken = (2 * (change * now[:, rows]).sum(1) > (change * bent[:, rows]).sum(1))[:, None]
                held[:, rows] = torch.where(taken, level, held[:, rows])
                now -= torch.where(taken, bent, 0.0)
            moved[column - start] = (pull[column] - now) * costs[column]
            pull[column + 1 : stop] -= whole[column + 1 : stop, column, None, None] * moved[column - start]
        pull[stop:].flatten(1).addmm_(whole[stop:, start:stop], moved.flatten(1), alpha=-1)
