"""Families: from a byte budget and a shape to concrete codecs.

A family is a set of ladders, each a list of codecs in order of cost. A budget between two rungs is met from below by
mixing them over rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from tersor.codec import Codec, Shape
from tersor.codecs import Dense, MixedRows, Rotated, Scalar, Uniform
from tersor.errors import BudgetError, UnknownCodecError

# levels between whole bits pay: 3 levels at 1.6 bits beat any mix of 2 and 4. Chosen for dense packing.
SCALAR_LEVELS = (2, 3, 4, 5, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256)
SLACK = 0.005  # share of a budget that a family may leave unused
UNIFORM_LEVELS = (2, 3, 4, 5, 6, 8, 11, 16, 22, 32, 64, 128, 256)


def _as_is(codec: Codec) -> Codec:
    return codec


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Rungs in order of cost, and how a rung or a mix of two is wrapped (a rotation goes around the mix)."""

    rungs: tuple[Codec, ...]
    wrap: Callable[[Codec], Codec] = _as_is

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the costliest codec of this ladder that stores a matrix of `shape` in at most `nbytes`.

        Raises
        ------
        BudgetError
            If even the least rung needs more.
        """
        rungs = sorted(self.rungs, key=lambda codec: codec.nbytes(shape))
        affordable = [codec for codec in rungs if codec.nbytes(shape) <= nbytes]
        if not affordable:
            least = rungs[0].nbytes(shape)
            raise BudgetError(_least_message(self.wrap(rungs[0]), shape, least, nbytes), least * 8 / math.prod(shape))
        lower = affordable[-1]
        dearer = rungs[len(affordable) :]
        if not dearer or shape[0] < 2:
            return self.at(lower)
        best = lower
        for order in ("energy", "head"):  # without the mask only where it leaves too much of the budget unused
            count = _most_rows(dearer[0], lower, order, shape, nbytes)
            mixed = MixedRows(dearer[0], lower, count, order) if count else lower
            if mixed.nbytes(shape) > best.nbytes(shape):
                best = mixed
            if best.nbytes(shape) >= (1 - SLACK) * nbytes:
                break
        return self.at(best) if best is lower else self.wrap(best)

    def at(self, rung: Codec) -> Codec:
        """Return a rung as it is used: wrapped, unless it is dense."""
        return rung if isinstance(rung, Dense) else self.wrap(rung)


def _most_rows(dearer: Codec, lower: Codec, order: str, shape: Shape, nbytes: int) -> int:
    """Return how many rows fit on the dearer rung, 0 where the mix costs more than `nbytes`."""
    low, high = 0, shape[0] - 1
    while low < high:
        middle = (low + high + 1) // 2
        if MixedRows(dearer, lower, middle, order).nbytes(shape) <= nbytes:
            low = middle
        else:
            high = middle - 1
    return low


def _least_message(codec: Codec, shape: Shape, least: int, nbytes: int) -> str:
    return (f"{nbytes} bytes ({8 * nbytes / math.prod(shape):.4g} bits per element) are too few for a matrix of shape "
            f"{shape}: the least rung '{codec}' needs {least} bytes ({8 * least / math.prod(shape):.4g})")


def _ladders() -> dict[str, tuple[Ladder, ...]]:
    tops = (Dense("bf16"), Dense("fp32"))
    gaussian = tuple(Scalar(levels) for levels in SCALAR_LEVELS)
    fitted = tuple(Scalar(levels, "fitted") for levels in SCALAR_LEVELS)
    grouped = tuple(Scalar(levels, "fitted", 128) for levels in SCALAR_LEVELS)
    return {
        "uniform": tuple(Ladder((*(Uniform(levels, size, symmetric) for levels in UNIFORM_LEVELS), *tops))
                         for size, symmetric in ((64, False), (128, False), (None, True))),
        "scalar": (Ladder((*fitted, *tops)), Ladder((*grouped, *tops)), Ladder((*gaussian, *tops))),
        "rotated_scalar": (Ladder((*gaussian, *tops), Rotated),),
    }


FAMILIES: Mapping[str, tuple[Ladder, ...]] = MappingProxyType(_ladders())
AUTO = "auto"


def families() -> tuple[str, ...]:
    """Return the names of the families, `auto` included."""
    return (AUTO, *FAMILIES)


def candidates(family: str, shape: Shape, nbytes: int) -> Sequence[Codec]:
    """Return the codecs of `family` that use at most `nbytes` for a matrix of `shape`, one a ladder.

    Raises
    ------
    BudgetError
        If `nbytes` lies below every ladder's least rung; `least` is in bits per element.
    UnknownCodecError
        If there is no such family.
    """
    if family != AUTO and family not in FAMILIES:
        raise UnknownCodecError(family, families(), "family")
    ladders = [ladder for name, group in FAMILIES.items() if family in (AUTO, name) for ladder in group]
    found: list[Codec] = []
    failures: list[BudgetError] = []
    for ladder in ladders:
        try:
            found.append(ladder.fit(shape, nbytes))
        except BudgetError as error:
            failures.append(error)
    if not found:
        raise min(failures, key=lambda error: error.least)
    return list(dict.fromkeys(found))
