"""A ladder: codecs in order of cost, one for every budget.

The codecs of a ladder are its *rungs*. `fit` returns the costliest codec that a budget allows, `rungs` what a survey
may try. Presets and families of low rank are ladders too: their rungs follow from the budget instead of a list.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from tersor.codecs import MixedRows
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.payload.blocks import Shape

RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # bits per element at which rungs are taken
SLACK = 0.005  # share of a budget that a ladder may leave unused


def as_is(codec: Codec) -> Codec:
    """Return the codec, wrapped in nothing."""
    return codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(abc.ABC):
    """What turns budgets into codecs.

    Parameters
    ----------
    planned : bool
        Whether a whole model's plan may use it.
    alone : bool
        Whether a matrix by itself may use it.
    """

    planned: bool = True
    alone: bool = True

    rates: ClassVar[tuple[float, ...]] = RATES

    @abc.abstractmethod
    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the costliest codec that stores a matrix of `shape` in at most `nbytes`.

        Raises
        ------
        BudgetError
            If even the least codec needs more; see `too_few`.
        """

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return the distinct codecs that `fit` gives at the reachable ones of `rates`, cheapest first."""
        found = []
        for rate in self.rates:
            try:
                found.append(self.fit(shape, math.floor(rate * math.prod(shape) / 8)))
            except BudgetError:
                continue  # this rate lies below the least of this shape; the next may not
        return tuple(dict.fromkeys(found))

    def fixed(self) -> Sequence[Codec]:
        """Return the rungs that no shape changes, plain numbers aside; by default none."""
        return ()


@dataclasses.dataclass(frozen=True)
class Ladder(Budgeted):
    """Steps in order of cost, and how a step or a mix of two is wrapped (a rotation goes around the mix).

    A budget between two rungs is met from below by mixing them over rows.

    Parameters
    ----------
    steps : tuple of Codec
    wrap : callable
    tops : tuple of Codec
        The dearest rungs, plain numbers, which are not wrapped.
    least_part : int
        Rows that either part of a mix has at least.
    """

    steps: tuple[Codec, ...]
    wrap: Callable[[Codec], Codec] = as_is
    tops: tuple[Codec, ...] = ()
    least_part: int = 1

    def fixed(self) -> Sequence[Codec]:
        """Return every step as it is used."""
        return [self.wrap(step) for step in self.steps]

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return every step as it is used, then the tops."""
        del shape
        return [*self.fixed(), *self.tops]

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the costliest codec, a rung or a mix of two, within `nbytes`; see `Budgeted.fit`."""
        used = zip((*self.steps, *self.tops), self.rungs(shape), strict=True)
        ordered = sorted(used, key=lambda rung: rung[1].nbytes(shape))
        affordable = [rung for rung in ordered if rung[1].nbytes(shape) <= nbytes]
        if not affordable:
            raise too_few(ordered[0][1], shape, nbytes)
        lower, best = affordable[-1]
        dearer = ordered[len(affordable) :]
        if not dearer or shape[0] < 2:
            return best
        for order in ("energy", "head"):  # without the mask only where it leaves too much of the budget unused
            mixed = self._mixed(dearer[0][0], lower, order, shape, nbytes)
            if mixed is not None and mixed.nbytes(shape) > best.nbytes(shape):
                best = mixed
            if best.nbytes(shape) >= (1 - SLACK) * nbytes:
                break
        return best

    def _mixed(self, dearer: Codec, lower: Codec, order: str, shape: Shape, nbytes: int) -> Codec | None:
        """Return the mix with most rows on the dearer step, or None where every mix costs more than `nbytes`."""
        def mixed(count: int) -> Codec:
            return self.wrap(MixedRows(dearer, lower, count, order))

        count = most(shape[0] - self.least_part, lambda count: mixed(count).nbytes(shape), nbytes)
        return mixed(count) if count >= self.least_part else None


def too_few(least: Codec, shape: Shape, nbytes: int) -> BudgetError:
    """Return the error for a budget of `nbytes` below the `least` rung on a matrix of `shape`."""
    return BudgetError(f"{nbytes} bytes ({8 * nbytes / math.prod(shape):.4g} bits per element) are too few for a "
                       f"matrix of shape {shape}: the least rung '{least}' needs {least.nbytes(shape)} bytes "
                       f"({least.rate(shape):.4g})", least.nbytes(shape))


def most(ceiling: int, cost: Callable[[int], int], budget: float) -> int:
    """Return the largest count up to `ceiling` whose cost, rising with the count, is within the budget; 0 if none."""
    low, high = 0, ceiling
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
