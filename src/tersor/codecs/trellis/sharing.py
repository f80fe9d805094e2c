"""Which bits of one stream each axis of a spectral code gets, and the linear code that they make.

An axis has 0 to 7 bits; or two neighbours share an odd number, as the packaged filters of 1.5 to 4.5 bits do. Those err
a quarter to a fifth less than one axis of more bits and one of fewer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from tersor.codecs.trellis.filters import Filter, filter_editions

MEMORY = 12  # bits of the window
MOST_SHIFT = 5  # bits of an axis, of all axes on average, and of one that has a packaged filter
DISTORTION = (1.0, 0.363, 0.0757, 0.0193, 0.00502, 0.0014)  # of a unit normal number by its bits
SHARED = (0.164, 0.0388, 0.00996, 0.00263)  # of two, that share 3, 5, 7, 9 bits
FIRST_SHARED = MOST_SHIFT + 1  # kinds from here on: an axis that shares 3, 5, 7, 9 bits with its neighbour
FIRST_FINE = FIRST_SHARED + len(SHARED)  # kinds from here on: 6 and 7 bits
FINE_DISTORTION = (0.0004, 0.000113)
LEVELS = {**{bits: float(bits) for bits in range(MOST_SHIFT + 1)},
          **{FIRST_SHARED + i: i + 1.5 for i in range(len(SHARED))},
          **{FIRST_FINE + i: MOST_SHIFT + 1.0 + i for i in range(len(FINE_DISTORTION))}}  # bits of an axis by its kind
FINE = ((0.03318, 0.11745, -0.35892, 0.60281, -0.18262, -0.86132, -0.34772, -0.25264, -0.2794, -0.50279, -0.13177,
         -0.57115),
        (0.01461, 0.02726, 0.13958, -0.39023, 0.65744, -0.20071, -0.93964, -0.38187, -0.27792, -0.29223, -0.54071,
         -0.14347))  # taps: those of 5 bits with finer bits before, fitted by least squares to what they encode
SOURCES = {2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}  # the packaged filters whose taps so many bits take
SINGLE = (math.sqrt(2 / math.pi), *[0.0] * (MEMORY - 1))  # of one bit: linear codes of that rate gain nothing on a sign
TIE = 1e-12  # of all power, by which an axis is taken to have more than the one after it


def shared_out(power: Sequence[float], bits: int) -> list[int]:
    """Return the kind of every axis such that all have so many bits, and err least by `DISTORTION` and `SHARED`.

    Axes are dealt with in pairs, in their order, and of each count of bits the best way to it is kept.

    Parameters
    ----------
    power : sequence of float
        Variances, descending.
    bits : int
        At most 5 an axis.

    Returns
    -------
    list of int
        Kinds: up to 5 the bits of an axis; from 6 on it shares an odd number with its neighbour; 10 and 11 are 6 and
        7 bits.
    """
    held = np.asarray(power, np.float64)
    held = held + max(float(held.sum()), 1e-300) * TIE * np.arange(len(held), 0, -1)
    costs, taken = np.full(bits + 1, np.inf), []
    costs[0] = 0.0
    for first in range(0, len(held), 2):
        ways = _ways(len(held[first : first + 2]))
        best, choice = np.full(bits + 1, np.inf), np.zeros(bits + 1, np.uint8)
        for number, (way, count) in enumerate(ways):
            if count > bits:
                continue
            errors = float(np.dot([distortion(kind) for kind in way], held[first : first + 2]))
            found = costs[: bits + 1 - count] + errors
            better = found < best[count:]
            best[count:][better], choice[count:][better] = found[better], number
        costs = best
        taken.append((ways, choice))
    kinds: list[int] = []
    for ways, choice in reversed(taken):
        pair, count = ways[choice[bits]]
        kinds, bits = [*pair, *kinds], bits - count
    return kinds


def _ways(axes: int) -> list[tuple[tuple[int, ...], int]]:
    """Return the kinds that one or two axes may have, and their bits."""
    alone = {**{bits: bits for bits in range(MOST_SHIFT + 1)},
             **{FIRST_FINE + i: MOST_SHIFT + 1 + i for i in range(len(FINE))}}
    whole = [(kinds, sum(alone[kind] for kind in kinds)) for kinds in itertools.product(alone, repeat=axes)]
    halves = [((kind, kind), 2 * (kind - FIRST_SHARED) + 3) for kind in range(FIRST_SHARED, FIRST_SHARED + len(SHARED))]
    return [*whole, *halves] if axes == 2 else whole


def distortion(kind: int) -> float:
    """Return the error of a unit normal number along an axis of a kind."""
    return (*DISTORTION, *SHARED, *FINE_DISTORTION)[kind]


def code_of(kinds: tuple[int, ...]) -> Filter:
    """Return the code of one step an axis, taps of the packaged codes of its rate.

    Parameters
    ----------
    kinds : tuple of int
        Of the axes that have bits.

    Raises
    ------
    ValueError
        If an axis that shares its bits has no such neighbour, or there is no such kind.
    """
    shifts: list[int] = []
    taps: list[tuple[float, ...]] = []
    seen = dict.fromkeys(SOURCES, 0)
    rest = list(kinds)
    while rest:
        kind = rest.pop(0)
        if kind == 1:
            shifts.append(1)
            taps.append(SINGLE)
        elif kind in SOURCES:
            source = filter_editions()[SOURCES[kind], MEMORY, 1]
            shifts.append(kind)
            taps.append(source.taps[seen[kind] % len(source.taps)])
            seen[kind] += 1
        elif FIRST_FINE <= kind < FIRST_FINE + len(FINE):
            shifts.append(MOST_SHIFT + 1 + kind - FIRST_FINE)
            taps.append(FINE[kind - FIRST_FINE])
        elif FIRST_SHARED <= kind < FIRST_FINE and rest and rest.pop(0) == kind:
            source = filter_editions()[kind - FIRST_SHARED + 1.5, MEMORY, 1]
            shifts += source.shifts
            taps += source.taps
        else:
            raise ValueError(f"axes of kinds {kinds} are no code")
    return Filter(tuple(shifts), tuple(taps))
