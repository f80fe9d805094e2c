"""Which columns get how many bits: reverse water-filling with real codes in place of ideal ones.

For independent Gaussian columns the least error at a rate gives every column the same error, and no bits to columns
whose energy lies below it (Kolmogorov 1956; Cover and Thomas, Elements of Information Theory, 10.3.3). Real codes come
in steps: each step goes where it lowers the error most. Widths are counted in half bits an element.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

from tersor.codecs.vector.orbits import DIM
from tersor.errors import CodecConfigError

# By width in half bits: the bits of the symmetric codebooks of 8 numbers that follow one another, the second for what
# the first leaves, or of 8 scalars; and their relative error on Gaussian numbers (tests/codecs/test_allocated.py).
GRADES: tuple[tuple[int, tuple[int, ...], float], ...] = (
    (0, (), 1.0), (1, (4,), 0.6032), (2, (8,), 0.3160), (3, (12,), 0.1691), (4, (16,), 0.08625), (5, (20,), 0.04392),
    (6, (24,), 0.02220), (7, (28,), 0.01119), (8, (32,), 0.00573), (9, (20, 16), 0.00410), (10, (24, 16), 0.00206),
    (11, (24, 20), 0.00107), (12, (28, 20), 0.000546), (13, (28, 24), 0.000282),
    (14, (7,) * DIM, 0.000162), (16, (8,) * DIM, 0.0000407))
MOST = GRADES[-1][0]  # half bits of an element
ROUNDS = 4  # of `allocate_both`; the widths no longer change after two or three


def grades() -> tuple[int, ...]:
    """Return the widths that a column can have, in half bits an element, ascending."""
    return tuple(width for width, _, _ in GRADES)


def widths_for(energies: Tensor, total: int) -> Tensor:
    """Return a width for each column, int64 (columns,) of `grades()`, of sum at most `total`.

    Greedy on the lower convex hull of the table of errors, the steepest step first: the least sum of energy times
    error of all allocations with the same sum, wherever no step was left out because it did not fit.

    Parameters
    ----------
    energies : Tensor
        Non-negative, (columns,), float64 on the processor; only their ratios matter.
    total : int
        Half bits an element, summed over the columns.
    """
    steps = list(itertools.pairwise(_hull()))
    size = torch.tensor([high[0] - low[0] for low, high in steps])
    gain = torch.tensor([low[1] - high[1] for low, high in steps], dtype=torch.float64)
    slopes = (energies.to(torch.float64).unsqueeze(1) * (gain / size)).reshape(-1)
    order = slopes.argsort(descending=True, stable=True)[: int((slopes > 0).sum())]
    spent = size.repeat(len(energies))[order].cumsum(0)
    whole = int((spent <= total).sum())
    taken = torch.bincount(order[:whole] // len(size), minlength=len(energies))
    left = total - (int(spent[whole - 1]) if whole else 0)
    for index in order[whole:].tolist():
        if not left:
            break
        column, number = divmod(index, len(size))
        if int(taken[column]) == number and int(size[number]) <= left:
            taken[column] += 1
            left -= int(size[number])
    return torch.tensor([width for width, _ in _hull()])[taken]


def allocate_both(energies: tuple[Tensor, Tensor], totals: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return widths for both factors of a low-rank code, each of (components,).

    A component of energy e whose unit vectors are coded with relative errors a and b is wrong by
    `e (1 - (1 - a) (1 - b))`: given the one factor's widths, the other's are an allocation for energies `e (1 - a)`.
    A component that one side drops is dropped by both.

    Parameters
    ----------
    energies : (Tensor, Tensor)
        What a relative error of 1 in a component of the left and of the right factor costs: both the squared singular
        values, unless a Hessian tells the sides apart.
    totals : (int, int)
        As in `widths_for`.
    """
    left = right = widths_for(energies[1], totals[1])
    for _ in range(ROUNDS):
        left = widths_for(energies[0] * (1.0 - errors_of(right)), totals[0])
        right = widths_for(energies[1] * (1.0 - errors_of(left)), totals[1])
    return left, right


def errors_of(widths: Tensor) -> Tensor:
    """Return the relative error of Gaussian columns of these widths, float64."""
    return torch.tensor([error for _, _, error in GRADES], dtype=torch.float64)[grades_of(widths)]


def grades_of(widths: Tensor) -> Tensor:
    """Return the places of widths in `grades()`, int64.

    Raises
    ------
    CodecConfigError
        If a width is none of them.
    """
    known = widths_table()
    places = torch.searchsorted(known, widths.contiguous()).clamp_max(len(known) - 1)
    if not torch.equal(known[places], widths):
        raise CodecConfigError(f"allocated: widths must be among {grades()}, found {sorted(set(widths.tolist()))}")
    return places


@cache
def widths_table() -> Tensor:
    """Return `grades()` as an int64 tensor."""
    return torch.tensor(grades(), dtype=torch.int64)


@cache
def _hull() -> tuple[tuple[int, float], ...]:
    """Return the lower convex hull of (width, error)."""
    hull: list[tuple[int, float]] = []
    for width, _, error in GRADES:
        while len(hull) > 1 and ((hull[-1][1] - error) * (hull[-1][0] - hull[-2][0])
                                 >= (hull[-2][1] - hull[-1][1]) * (width - hull[-1][0])):
            hull.pop()
        hull.append((width, error))
    return tuple(hull)
