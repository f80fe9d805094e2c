"""Levels once more, now that errors of different rows make up for one another too.

A model suffers from errors E by `tr(G E H Eᵀ)`, about; see `numerics.sides`. Columns are taken one after another, those
of a word together, and in each the rows by classes: a class moves where all of its moves together lower the cost.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.state import State, inverse, nearest
from tersor.gguf.types.base import CodedType
from tersor.gguf.types.words import GROUP, WordType
from tersor.gguf.wording import nearest_words
from tersor.numerics.sides import ROWS, Blocks, classes, damped, laid, levels_of

BLOCK = 128  # columns whose mutual corrections are applied one by one before the rest is updated at once


@dataclasses.dataclass(frozen=True, eq=False)
class Across:
    """How errors of different rows of a matrix add up.

    Attributes
    ----------
    whole : Tensor
        (w, w): H, damped.
    sides : sequence of Tensor
        The blocks of G, of `ROWS` rows each; the last may be smaller.
    sweeps : int
        Over all levels.
    """

    whole: Tensor
    sides: Blocks
    sweeps: int

    @classmethod
    def of(cls, hessian: Tensor, sides: Blocks, sweeps: int, damping: float = 0.01) -> Across:
        """Return what encoding needs of `E[x xᵀ]` (w, w), damped as `Inputs` has it."""
        whole = hessian.to(torch.float32, copy=True)
        whole.diagonal().add_(damping * (float(whole.diagonal().mean(dtype=torch.float64)) or 1.0))
        return cls(whole, sides, sweeps)

    def part(self, start: int, stop: int) -> Across:
        """Return what is known of some rows, which are whole blocks."""
        return dataclasses.replace(self, sides=self.sides[start // ROWS : -(-stop // ROWS)])


def sided(kind: CodedType, target: Tensor, state: State, across: Across) -> State:
    """Return a state of whole rows (n, w), of the same scales and minima, whose levels were chosen anew."""
    sides = across.sides
    levels, steps = laid(state.levels, sides), laid(state.steps(), sides)
    aim = laid(target - dataclasses.replace(state, levels=torch.zeros_like(state.levels)).values(), sides)
    sweep = _Sweep(kind, aim, steps, across.whole, damped(sides))
    for _ in range(across.sweeps):
        sweep.run(levels)
    return dataclasses.replace(state, levels=levels_of(levels, len(target)))


class _Sweep:
    """Sweeps over levels (w, b, r) of b blocks of rows, in place; no step raises the cost.

    Parameters
    ----------
    kind : CodedType
    aim : Tensor
        (w, b, r): what levels times steps are to be.
    steps : Tensor
        (k, b, r), by sub-block.
    whole : Tensor
        (w, w).
    sides : Tensor
        (b, r, r).
    """

    def __init__(self, kind: CodedType, aim: Tensor, steps: Tensor, whole: Tensor, sides: Tensor) -> None:
        self._kind, self._aim, self._steps, self._whole, self._sides = kind, aim, steps, whole, sides
        self._unit = GROUP if isinstance(kind, WordType) else 1
        own = torch.stack([whole[at : at + self._unit, at : at + self._unit]
                           for at in range(0, len(whole), self._unit)])
        self._back = torch.linalg.inv(own.to(torch.float64)).to(torch.float32)
        self._share = inverse(steps) * inverse(sides.diagonal(dim1=1, dim2=2))
        self._parts = classes(sides)

    def run(self, levels: Tensor) -> None:
        """Sweep once."""
        error = self._aim - levels * self._steps.repeat_interleave(self._kind.sub, 0)
        pull = torch.einsum("bij,cbj->cbi", self._sides, (self._whole @ error.flatten(1)).reshape(error.shape))
        pull = pull.contiguous()
        moved_one = self._words if isinstance(self._kind, WordType) else self._level
        for start in range(0, len(pull), BLOCK):
            stop = min(start + BLOCK, len(pull))
            moved = torch.empty(stop - start, *pull.shape[1:], device=pull.device)
            for column in range(start, stop, self._unit):
                end = column + self._unit
                own = moved[column - start : end - start]
                own.copy_(moved_one(levels[column:end], pull[column:end], column))
                pull[end:stop].flatten(1).addmm_(self._whole[end:stop, column:end], own.flatten(1), alpha=-1)
            pull[stop:].flatten(1).addmm_(self._whole[stop:, start:stop], moved.flatten(1), alpha=-1)

    def _level(self, levels: Tensor, pull: Tensor, column: int) -> Tensor:
        """Choose a column's levels (1, b, r) anew, class by class; return by how much their weights have moved.

        `pull` is half of what the cost falls by along each weight. What is returned are the moves as later columns see
        them: multiplied by G.
        """
        kind, sub, cost = self._kind, column // self._kind.sub, self._whole[column, column]
        held, before, step, back = levels[0], pull[0], self._steps[sub], self._back[column, 0, 0]
        now, share = before.clone(), self._share[sub] * back  # G times moves is taken off as classes move
        for rows, part in self._parts:
            mine, old = now[:, rows], held[:, rows]
            level = nearest(kind, torch.addcmul(old, mine, share[:, rows]))
            change = (level - old) * step[:, rows]
            bent = torch.bmm(part, (change * cost)[..., None])[..., 0]
            taken = torch.linalg.vecdot(change, 2 * mine - bent[:, rows])[:, None] > 0
            held[:, rows] = torch.where(taken, level, old)
            now -= bent * taken
        return (before - now) * back

    def _words(self, levels: Tensor, pull: Tensor, column: int) -> Tensor:
        """As `_level`, for the eight columns of a word."""
        kind, sub = self._kind, column // self._kind.sub
        assert isinstance(kind, WordType)
        own, back = self._whole[column : column + GROUP, column : column + GROUP], self._back[column // GROUP]
        held, before = levels.permute(1, 2, 0), pull.permute(1, 2, 0)  # (b, r, 8)
        now, step, share = before.clone(), self._steps[sub][..., None], self._share[sub][..., None]
        for rows, part in self._parts:
            mine, old = now[:, rows], held[:, rows]
            wanted = old + (mine @ back) * share[:, rows]
            level = nearest_words(kind, wanted.reshape(-1, GROUP), own).reshape(wanted.shape)
            change = (level - old) * step[:, rows]
            bent = torch.bmm(part, change @ own)
            taken = (change * (2 * mine - bent[:, rows])).sum((1, 2), keepdim=True) > 0
            held[:, rows] = torch.where(taken, level, old)
            now -= bent * taken
        return ((before - now) @ back).permute(2, 0, 1)
