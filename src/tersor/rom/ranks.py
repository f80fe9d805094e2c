"""Which rank each linear of a model gets, when all together may keep so many parameters.

With errors that add up over linears, and rank i of linear l taking `e` off at the cost of `c` parameters, the best
ranks take the largest `e / c` first, over all linears: reverse water-filling, optimal as long as ratios fall with i.
Gauge-fixed storage makes later ranks cheaper, and a linear past break-even is better kept dense; both break convexity,
so those are solved on a grid of ranks by the planner's dynamic program (`tersor.planning.plan.spend`).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

import numpy as np

from tersor.codecs.scalar.dense import Dense
from tersor.errors import BudgetError, CodecConfigError
from tersor.payload.blocks import Shape
from tersor.planning.plan import Choice, spend

ALLOCATIONS = ("uniform", "last", "water")
STORAGES = ("pair", "gauge")
GRID = 64  # ranks a linear that the dynamic program tries; single ranks are filled in after it
PUBLISHED = ((1.0, 0.0), (0.9, 8 / 32), (0.8, 12 / 32), (0.5, 24 / 32), (0.3, 1.0))  # keep, share of the blocks reduced
INDEX_BITS = 16.0  # what a parameter weighs against bits of an index


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """One linear that may be reduced.

    Attributes
    ----------
    shape : (int, int)
        (out, in).
    block : int
        Which block of the model it lies in, from 0.
    errors : np.ndarray
        Cost of the errors of rank 0, 1, …, (k + 1,), never rising; comparable over linears.
    extra : int
        Parameters that a reduced form takes besides its factors: of an added bias.
    """

    shape: Shape
    block: int
    errors: np.ndarray
    extra: int = 0

    @property
    def dense(self) -> int:
        """Parameters of the linear as it is."""
        return self.shape[0] * self.shape[1]

    def cost(self, rank: int | None, storage: str) -> int:
        """Return the parameters of a rank; of the dense linear for None."""
        return self.dense if rank is None else parameters(self.shape, rank, storage) + self.extra

    def most(self, storage: str) -> int:
        """Return the largest rank that costs less than the dense linear; 0: none does."""
        low, high = 0, min(self.shape)
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(middle, storage) < self.dense:
                low = middle
            else:
                high = middle - 1
        return low

    def error(self, rank: int | None) -> float:
        """Return the cost of the error of a rank; 0 for the dense linear."""
        return 0.0 if rank is None else float(self.errors[min(rank, len(self.errors) - 1)])


def parameters(shape: Shape, rank: int, storage: str) -> int:
    """Return the numbers that rank `rank` of a matrix takes.

    A pair of factors takes r (d1 + d2); gauge-fixed, r (d1 + d2 - r) and an index of min(d1, d2) bits, counted in
    parameters of 16 bits.
    """
    out, width = shape
    if storage == "pair":
        return rank * (out + width)
    return rank * (out + width - rank) + math.ceil(min(out, width) / INDEX_BITS)


def ranks_for(linears: Sequence[Linear], keep: float, allocation: str, storage: str) -> list[int | None]:
    """Return a rank for every linear, None where it stays dense, within `keep` of all their parameters.

    Parameters
    ----------
    keep : float
        Share of the parameters, in (0, 1].
    allocation : str
        `"uniform"`: the same share of every linear. `"last"`: the same share of those in the last blocks, as published.
        `"water"`: the least sum of errors.
    storage : str
        `"pair"` or `"gauge"`.

    Raises
    ------
    BudgetError
        If `keep` lies outside (0, 1], or even rank 1 of every linear takes more.
    CodecConfigError
        If a word is unknown, or no linear gets smaller at any rank.
    """
    check_keep(keep)
    if allocation not in ALLOCATIONS or storage not in STORAGES:
        raise CodecConfigError(f"allocation must be one of {ALLOCATIONS} and storage one of {STORAGES}, found "
                               f"{allocation!r} and {storage!r}")
    total = sum(linear.dense for linear in linears)
    budget = math.floor(keep * total)
    if budget >= total:
        return [None] * len(linears)
    most = [linear.most(storage) for linear in linears]
    if not any(most):
        raise CodecConfigError("every linear of this model is below break-even: rank 1 of each takes as many "
                               "parameters as the linear itself; there is nothing to reduce")
    chosen = _last(linears, keep) if allocation == "last" else [True] * len(linears)
    chosen = [one and bool(rank) for one, rank in zip(chosen, most, strict=True)]
    least = sum(linear.cost(1 if one else None, storage) for linear, one in zip(linears, chosen, strict=True))
    if least > budget:
        raise BudgetError(f"keep {keep:.4g} of {total} parameters cannot be reached: rank 1 everywhere takes "
                          f"{least / total:.4g}")
    if allocation == "water":
        return _fill(linears, _dynamic(linears, most, chosen, budget, storage), most, budget, storage)
    ranks = _share(linears, most, chosen, budget, storage)
    return _even(linears, ranks, most, budget, storage)


def check_keep(keep: float) -> None:
    """Raise `BudgetError` unless `keep` lies in (0, 1]."""
    if not 0 < keep <= 1:
        raise BudgetError("keep is the share of the linears' parameters that stays, above 0 and at most 1; found "
                          f"{keep}")


def blocks_reduced(keep: float, blocks: int) -> int:
    """Return how many blocks, the last ones, the published recipe reduces: 8, 12 or 24 of 32 at 90, 80 or 50 %."""
    points = sorted(PUBLISHED)
    share = float(np.interp(keep, [k for k, _ in points], [s for _, s in points]))
    return min(blocks, max(1, round(share * blocks)))


def _last(linears: Sequence[Linear], keep: float) -> list[bool]:
    blocks = max(linear.block for linear in linears) + 1
    count = blocks_reduced(keep, blocks)
    total = sum(linear.dense for linear in linears)
    while True:  # a shallow model's last blocks alone may hold less than what has to go
        inside = [linear.block >= blocks - count for linear in linears]
        held = sum(linear.dense for linear, one in zip(linears, inside, strict=True) if one)
        if count == blocks or held * 0.9 >= (1 - keep) * total:
            return inside
        count += 1


def _share(linears: Sequence[Linear], most: Sequence[int], chosen: Sequence[bool], budget: int,
           storage: str) -> list[int | None]:
    """Return ranks of one share of every chosen linear, the largest share that fits."""
    def at(share: float) -> list[int | None]:
        return [_rank_of(linear, share, top, storage) if one else None
                for linear, top, one in zip(linears, most, chosen, strict=True)]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if total_cost(linears, at(middle), storage) <= budget:
            low = middle
        else:
            high = middle
    return at(low)


def _rank_of(linear: Linear, share: float, top: int, storage: str) -> int:
    """Return the largest rank within a share of the dense linear's parameters; at least 1."""
    low, high = 1, top
    while low < high:
        middle = (low + high + 1) // 2
        if linear.cost(middle, storage) <= share * linear.dense:
            low = middle
        else:
            high = middle - 1
    return low


def total_cost(linears: Sequence[Linear], ranks: Sequence[int | None], storage: str) -> int:
    """Return the parameters of all linears at these ranks."""
    return sum(linear.cost(rank, storage) for linear, rank in zip(linears, ranks, strict=True))


def _even(linears: Sequence[Linear], ranks: list[int | None], most: Sequence[int], budget: int,
          storage: str) -> list[int | None]:
    """Give what rounding left over to one linear after another, a rank each; in place."""
    rest = budget - total_cost(linears, ranks, storage)
    for row in range(len(linears)):
        rank = ranks[row]
        if rank is not None and rank < most[row]:
            step = linears[row].cost(rank + 1, storage) - linears[row].cost(rank, storage)
            if step <= rest:
                ranks[row], rest = rank + 1, rest - step
    return ranks


def _dynamic(linears: Sequence[Linear], most: Sequence[int], chosen: Sequence[bool], budget: int,
             storage: str) -> list[int | None]:
    """Return the best ranks of a grid, or dense, by the planner's dynamic program."""
    mark, grids, choices = Dense("fp32"), [], {}
    for row, (linear, top, one) in enumerate(zip(linears, most, chosen, strict=True)):
        grid: list[int | None] = [*_grid(linear, top)] if one else []
        grids.append({linear.cost(rank, storage): rank for rank in (*grid, None)})
        choices[str(row)] = [Choice(mark, cost, linear.error(rank)) for cost, rank in grids[-1].items()]
    picks = spend(choices, budget)
    return [grid[picks[str(row)].nbytes] for row, grid in enumerate(grids)]


def _grid(linear: Linear, top: int) -> list[int]:
    """Return ranks from 1 to `top`: every one of a few, else evenly spaced."""
    top = min(top, max(1, len(linear.errors) - 1))
    return sorted({round(1 + (top - 1) * i / (GRID - 1)) for i in range(GRID)})


def _fill(linears: Sequence[Linear], ranks: list[int | None], most: Sequence[int], budget: int,
          storage: str) -> list[int | None]:
    """Move single ranks to where they do most: first swaps between linears, then what is left; in place."""
    rest = budget - total_cost(linears, ranks, storage)
    while True:
        gains = [(row, *_step(linears[row], ranks[row], most[row], storage, 1)) for row in range(len(linears))]
        losses = [(row, *_step(linears[row], ranks[row], most[row], storage, -1)) for row in range(len(linears))]
        best = (0.0, -1, -1)
        fitting = [(gain, row) for row, gain, cost in gains if cost <= rest]
        if fitting:
            gain, row = max(fitting)
            best = max(best, (gain, row, -1))
        best = max(best, _swap(gains, losses, rest))
        if best[1] < 0:
            return ranks
        for row, by in ((best[1], 1), (best[2], -1)):
            if row >= 0:
                rest -= linears[row].cost((ranks[row] or 0) + by, storage) - linears[row].cost(ranks[row], storage)
                ranks[row] = (ranks[row] or 0) + by


def _step(linear: Linear, rank: int | None, top: int, storage: str, by: int) -> tuple[float, int]:
    """Return what one rank more or less changes: error taken off, and parameters; (-inf, 0) where there is none."""
    if rank is None or not 1 <= rank + by <= top:
        return -math.inf, 0
    cost = linear.cost(rank + by, storage) - linear.cost(rank, storage)
    return linear.error(rank) - linear.error(rank + by), cost


def _swap(gains: Sequence[tuple[int, float, int]], losses: Sequence[tuple[int, float, int]],
          rest: int) -> tuple[float, int, int]:
    """Return the best exchange of one rank here for one there that fits: error taken off, and the two linears."""
    best = (0.0, -1, -1)
    ups = heapq.nlargest(8, gains, key=lambda step: step[1] / step[2] if step[2] else -math.inf)
    downs = heapq.nlargest(8, losses, key=lambda step: step[1] / -step[2] if step[2] else -math.inf)
    for to, gain, cost in ups:
        for off, loss, back in downs:
            total = gain + loss
            if to != off and cost + back <= rest and total > 1e-12 * abs(gain):
                best = max(best, (total, to, off))
    return best
