"""Families of low rank: from a byte budget to a rank and to widths of the components of both factors.

The best rank depends on the spectrum: many coarse components where it is flat, few fine ones where it falls off. A
ladder has one mean width; `lplr_plus` holds several, and `most_promising` keeps the one that the singular values of a
matrix favour.

`low_rank` adds quantized backbones with a low-rank code beside them, the shape of CALDERA (Saha, Sagan, Srivastava,
Goldsmith, Pilanci, NeurIPS 2024, arXiv 2405.18886) with the codecs of the house in both places; `Sum` alternates
between the two. Whether it pays depends on the spectrum: a plan, or `compress`, compares it with either part alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tersor.codecs import Allocated, LowRank, Rotated, Sum
from tersor.codecs.low_rank.alternating import DAMPING, OVERSAMPLE, POWER_ITERATIONS
from tersor.codecs.low_rank.factors import Weighted
from tersor.codecs.low_rank.published import SKETCH, generator_of
from tersor.codecs.low_rank.widths import MOST, allocate_both, errors_of
from tersor.contract.codec import Codec
from tersor.families.ladder import Budgeted, most, too_few
from tersor.numerics.settings import pinned
from tersor.payload.blocks import Shape

WIDTHS = (1.6, 2.1, 2.8, 3.8, 6.0)  # mean bits of a component's numbers; between them the error hardly changes
SHARES = (1 / 16, 1 / 4)  # of a backbone's bytes that a survey tries to spend on the low-rank part


@dataclasses.dataclass(frozen=True)
class LowRankLadder(Budgeted):
    """`lrM(alT;alT)`, or `rotboth,lrM(…)`, for any budget.

    Parameters
    ----------
    width : float
        Mean bits of the components' numbers, from which the rank follows; more where the rank has reached its limit.
    rotated : bool
        Behind a rotation of both sides, for matrices with outliers.
    """

    width: float
    rotated: bool = False
    planned: bool = dataclasses.field(default=False, kw_only=True)

    rates: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the codec that stores a matrix of `shape` in at most `nbytes`, within a digit a row of them.

        Raises
        ------
        BudgetError
            If one component of the least width needs more.
        """
        least = self._codec(1, (1, 1))
        if least.nbytes(shape) > nbytes:
            raise too_few(least, shape, nbytes)
        side = 2 * (2 + 0.5)  # scales and widths of a component
        wanted = max(math.floor(nbytes / (sum(_digits(shape)) * 2.0 * self.width + side)),
                     math.ceil(nbytes / (sum(_digits(shape)) * MOST + side)))  # fewer could not use all bytes
        return self._filled(shape, nbytes, max(1, min(wanted, *shape)))

    def _filled(self, shape: Shape, nbytes: int, rank: int) -> Codec:
        """Give out what `nbytes` leaves: as much to R as to L and `rank log2(out / in)` half bits more.

        At the optimum a half bit lowers the error by as much on either side, for `out` and for `in` of them.
        """
        digits = _digits(shape)
        left = nbytes - (self._codec(rank, (1, 1)).nbytes(shape) - sum(digits))
        mean = left / sum(digits)
        shift = max(-0.5 * mean, min(0.5 * mean, rank * math.log2(shape[0] / shape[1])))
        first = _within(math.floor(mean - shift * digits[1] / sum(digits)), rank)
        second = _within(math.floor((left - first * digits[0]) / digits[1]), rank)
        first = _within(math.floor((left - second * digits[1]) / digits[0]), rank)
        while self._codec(rank, (first, second)).nbytes(shape) > nbytes:  # half bytes are rounded up
            first, second = (first - 1, second) if first > 1 else (first, second - 1)
        return self._codec(rank, (first, second))

    def _codec(self, rank: int, totals: tuple[int, int]) -> Codec:
        codec = LowRank(rank, Allocated(totals[0]), Allocated(totals[1]))
        return Rotated(codec, "both") if self.rotated else codec


@dataclasses.dataclass(frozen=True)
class BackboneLadder(Budgeted):
    """`sum(lrR(alT;alT);backbone)`: the budget beyond the backbone buys rank.

    Parameters
    ----------
    backbone : Codec
    width : float
        Mean bits of a number of the factors, in halves; each component gets its own by its energy.
    """

    backbone: Codec
    width: float = 2.5

    def codec(self, rank: int, total: int | None = None) -> Sum:
        """Return the codec of a rank; `total` half bits an entry, summed over components, default by the mean width."""
        factor = Allocated(round(2 * self.width * rank) if total is None else total)
        return Sum((LowRank(rank, factor, factor), self.backbone))

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the codec of the highest rank that stores a matrix of `shape` in at most `nbytes`.

        Raises
        ------
        BudgetError
            If the backbone and one component need more; see `too_few`.
        """
        least = self.codec(1)
        if least.nbytes(shape) > nbytes:
            raise too_few(least, shape, nbytes)
        rank = most(min(shape), lambda rank: self.codec(rank).nbytes(shape), nbytes)
        return self.codec(rank, most(MOST * rank, lambda total: self.codec(rank, total).nbytes(shape), nbytes))

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return the codecs that spend `SHARES` of the backbone's bytes on the low-rank part, cheapest first."""
        alone = self.backbone.nbytes(shape)
        budgets = [alone + math.floor(share * alone) for share in SHARES]
        return tuple(dict.fromkeys(self.fit(shape, nbytes) for nbytes in budgets
                                   if self.codec(1).nbytes(shape) <= nbytes))


def ladders() -> tuple[LowRankLadder, ...]:
    """Return the ladders of the family `lplr_plus`."""
    return tuple(LowRankLadder(width, rotated) for rotated in (False, True) for width in WIDTHS)


def most_promising(matrix: Tensor, choices: Sequence[Codec], hessian: Tensor | None = None,
                   seed: int = 0) -> Sequence[Codec]:
    """Return `choices` less those low-rank codes that the spectrum of `matrix` (out, in) speaks against.

    Of the `lrM(alT;alT)` one stays, and one of those behind a rotation, which has no part in the prediction: the energy
    beyond the rank, and for every component `e (1 - (1 - a) (1 - b))` with the errors a and b of its widths. Costs one
    randomized range finder at the largest rank.
    """
    found = [(codec, low) for codec in choices if (low := _allocated(codec)) is not None]
    if len(found) < 2:
        return choices
    with pinned():
        target = Weighted.of(matrix, hessian, DAMPING)
        rank = max(low.rank for _, low in found)
        values = target.spectrum(rank, OVERSAMPLE, POWER_ITERATIONS, generator_of(seed, SKETCH))[2]
        energies = values.to(device="cpu", dtype=torch.float64).square()
    predicted = {low: _predicted(energies, low) for _, low in found}
    kept = {}
    for kind in {type(codec) for codec, _ in found}:
        rivals = [low for codec, low in found if type(codec) is kind]
        kept[kind] = min(rivals, key=predicted.__getitem__)
    dropped = [codec for codec, low in found if low != kept[type(codec)]]
    return [codec for codec in choices if codec not in dropped]


def _predicted(energies: Tensor, codec: LowRank) -> float:
    """Return the predicted squared error of a code, less the energy beyond all of `energies`."""
    totals = codec.left.to_config()["total"], codec.right.to_config()["total"]
    kept = energies[: codec.rank]
    left, right = allocate_both((kept, kept), totals)
    return float((kept * (1 - (1 - errors_of(left)) * (1 - errors_of(right)))).sum() + energies[codec.rank :].sum())


def _allocated(codec: Codec) -> LowRank | None:
    """Return the low-rank code of allocated factors in `codec`, if that is what it is."""
    inner = codec.inner if isinstance(codec, Rotated) else codec
    if isinstance(inner, LowRank) and isinstance(inner.left, Allocated) and isinstance(inner.right, Allocated):
        return inner
    return None


def _digits(shape: Shape) -> tuple[float, float]:
    """Return the bytes that a half bit of every number of a component takes, in L and in R."""
    return 0.5 * math.ceil(shape[0] / 8), 0.5 * math.ceil(shape[1] / 8)


def _within(total: int, rank: int) -> int:
    return max(1, min(total, MOST * rank))
