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
        The blocks of G, (r, r) each.
    """
    found, start = [], 0
    for side in sides:
        rows = slice(start, start + len(side))
        part = State(state.levels[rows], state.scales[rows], state.zeros[rows])
        mean = float(side.diagonal().mean(dtype=torch.float64))
        if mean > 0.0:
            damped = side.to(torch.float32) / mean
            damped.diagonal().add_(DAMPING)
            for _ in range(sweeps):
                part = _swept(scheme, target[rows].to(torch.float32), part, whole, damped)
        found.append(part.levels)
        start += len(side)
    return dataclasses.replace(state, levels=torch.cat(found))


def _swept(scheme: Scheme, target: Tensor, state: State, whole: Tensor, side: Tensor) -> State:
    """Return the levels after each column, from left to right, was chosen anew class by class."""
    pull = (side @ ((target - state.values()) @ whole)).T.contiguous()  # half of what the cost falls by, (w, n)
    steps = state.scales.T.contiguous()
    size = target.shape[1] // len(steps)
    levels = state.levels.T.to(torch.float32).contiguous()
    classes = [torch.arange(first, len(side), CLASSES, device=side.device) for first in range(CLASSES)]
    parts = [(rows, side[:, rows].contiguous()) for rows in classes if len(rows)]
    for start in range(0, len(pull), BLOCK):
        stop = min(start + BLOCK, len(pull))
        moved = torch.zeros(stop - start, pull.shape[1], device=pull.device)
        for column in range(start, stop):
            own, step = whole[column, column], steps[column // size]
            now, held = pull[column].clone(), levels[column]
            over = inverse(step) / (side.diagonal() * own)
            for rows, part in parts:
                level = nearest(scheme, held[rows] + now[rows] * over[rows])
                change = (level - held[rows]) * step[rows]
                bent = own * (part @ change)
                if bool(2 * (change @ now[rows]) > change @ bent[rows]):
                    held[rows] = level
                    now -= bent
                    moved[column - start] += bent / own
            pull[column + 1 : stop].addr_(whole[column + 1 : stop, column], moved[column - start], alpha=-1)
        pull[stop:].addmm_(whole[stop:, start:stop], moved, alpha=-1)
    return dataclasses.replace(state, levels=levels.to(torch.int8).T.contiguous())
