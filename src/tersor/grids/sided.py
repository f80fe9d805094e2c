"""Levels once more, now that errors of different rows make up for one another too.

A model suffers from errors E by `tr(G E H Eᵀ)`, about: H are the second moments of the inputs, G those of the loss's
gradients by the outputs (Martens and Grosse 2015; Tseng et al. 2025 round by it). Columns are taken one after another,
and in each the rows by classes: a class moves where all of its moves together lower the cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.grids.scheme import Scheme
from tersor.grids.solve import BLOCK
from tersor.grids.state import State, inverse, nearest

ROWS = 1024  # rows whose errors are weighed together: G is kept in blocks of so many
CLASSES = 16  # rows of a class lie so far apart
DAMPING = 0.1  # of G, times its mean diagonal


def parted(rows: int) -> list[int]:
    """Return the sizes of the blocks of G."""
    return [min(ROWS, rows - start) for start in range(0, rows, ROWS)]


def sided(scheme: Scheme, target: Tensor, state: State, whole: Tensor, sides: Sequence[Tensor], sweeps: int) -> State:
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
    size = len(sides[0])
    spare = len(sides) * size - len(target)  # rows that fill the last block; they have no pull, so they never move

    def laid(numbers: Tensor) -> Tensor:
        """Return numbers of rows (n, k) as (k, b, r)."""
        wide = torch.nn.functional.pad(numbers.to(torch.float32), (0, 0, 0, spare))
        return wide.T.reshape(-1, len(sides), size).contiguous()

    levels, steps = laid(state.levels), laid(state.scales)
    aim = laid(target - dataclasses.replace(state, levels=torch.zeros_like(state.levels)).values())
    damped = torch.stack([_damped(side, size) for side in sides])
    for _ in range(sweeps):
        _sweep(scheme, levels, (aim, steps), whole, damped)
    found = levels.flatten(1)[:, : len(target)].to(torch.int8).T.contiguous()
    return dataclasses.replace(state, levels=found)


def _damped(side: Tensor, size: int) -> Tensor:
    """Return a block of G, scaled and damped; zeros, by which no row moves, where it has none."""
    mean, found = float(side.diagonal().mean(dtype=torch.float64)), torch.zeros(size, size, device=side.device)
    if mean > 0.0:
        own = found[: len(side), : len(side)]
        own += side.to(torch.float32) / mean
        own.diagonal().add_(DAMPING)
    return found


def _sweep(scheme: Scheme, levels: Tensor, given: tuple[Tensor, Tensor], whole: Tensor, sides: Tensor) -> None:
    """Choose the levels (w, b, r) of b blocks of rows anew, column by column and class by class; no step waits."""
    aim, steps = given
    group = len(aim) // len(steps)
    error = aim - levels * steps.repeat_interleave(group, 0)
    pull = torch.einsum("bij,cbj->cbi", sides, (whole @ error.flatten(1)).reshape(error.shape)).contiguous()
    parts = [(slice(first, None, CLASSES), sides[:, :, first::CLASSES].contiguous())
             for first in range(min(CLASSES, sides.shape[1]))]
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
