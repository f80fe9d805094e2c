"""A ladder: codecs in order of cost, one for every budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from tersor.codecs import (
    Dense,
    MixedRows,
)
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.payload.blocks import Shape

SLACK = 0.005  # share of a budget that a family may leave unused


def _as_is(codec: Codec) -> Codec:
    return codec


class Budgeted(Protocol):
    """What turns budgets into codecs: a `Ladder`, or a published preset."""

    @property
    def planned(self) -> bool:
        """Whether a whole model's plan may use it."""
        ...

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the costliest codec that stores a matrix of `shape` in at most `nbytes`, or raise `BudgetError`."""
        ...

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return the codecs that a survey may try on a matrix of `shape`."""
        ...


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Steps in order of cost, and how a step or a mix of two is wrapped (a rotation goes around the mix).

    Parameters
    ----------
    steps : tuple of Codec
    wrap : callable
    planned : bool
        Whether a whole model's plan may use it. One scale a matrix is for a matrix by itself: error feedback drives the
        larger rows beyond what the codebook reaches (KL .065 instead of .044 on fable-22m at 4 bits, docs/log.md).
    alone : bool
        Whether a matrix by itself may use it. Annealing takes long, so it is not tried both along inputs and along
        outputs, which only error feedback gains from.
    """

    steps: tuple[Codec, ...]
    wrap: Callable[[Codec], Codec] = _as_is
    planned: bool = True
    alone: bool = True

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return every step as it is used."""
        del shape
        return [self.at(step) for step in self.steps]

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the costliest codec of this ladder that stores a matrix of `shape` in at most `nbytes`.

        Raises
        ------
        BudgetError
            If even the least rung needs more.
        """
        steps = sorted(self.steps, key=lambda step: self.at(step).nbytes(shape))
        affordable = [step for step in steps if self.at(step).nbytes(shape) <= nbytes]
        if not affordable:
            codec = self.at(steps[0])
            least = codec.nbytes(shape)
            raise BudgetError(_least_message(codec, shape, least, nbytes), least * 8 / math.prod(shape))
        lower, dearer = affordable[-1], steps[len(affordable) :]
        best = self.at(lower)
        if not dearer or shape[0] < 2:
            return best
        for order in ("energy", "head"):  # without the mask only where it leaves too much of the budget unused
            mixed = self._mixed(dearer[0], lower, order, shape, nbytes)
            if mixed is not None and mixed.nbytes(shape) > best.nbytes(shape):
                best = mixed
            if best.nbytes(shape) >= (1 - SLACK) * nbytes:
                break
        return best

    def _mixed(self, dearer: Codec, lower: Codec, order: str, shape: Shape, nbytes: int) -> Codec | None:
        """Return the mix with most rows on the dearer step, or None where every mix costs more than `nbytes`."""
        def mixed(count: int) -> Codec:
            return self.wrap(MixedRows(dearer, lower, count, order))

        count = most(shape[0] - 1, lambda count: mixed(count).nbytes(shape), nbytes)
        return mixed(count) if count else None

    def at(self, rung: Codec) -> Codec:
        """Return a rung as it is used: wrapped, unless it is dense."""
        return rung if isinstance(rung, Dense) else self.wrap(rung)


def _least_message(codec: Codec, shape: Shape, least: int, nbytes: int) -> str:
    return (f"{nbytes} bytes ({8 * nbytes / math.prod(shape):.4g} bits per element) are too few for a matrix of shape "
            f"{shape}: the least rung '{codec}' needs {least} bytes ({8 * least / math.prod(shape):.4g})")


RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)


def most(ceiling: int, cost: Callable[[int], int], budget: float) -> int:
    """Return the largest count up to `ceiling` whose cost, rising with the count, is within the budget; 0 if none."""
    low, high = 0, ceiling
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
