"""Where annealing of two-basis codes starts: levels and temperatures, tuned for some pairs of alphabets."""

from __future__ import annotations

import dataclasses

from tersor.codecs.bases.anneal import standard_levels


@dataclasses.dataclass(frozen=True)
class Start:
    """Where annealing of a pair of alphabets starts on the unit normal, tuned at 1,000 sweeps (docs/log.md).

    Positive levels of both alphabets, ascending, and first and last temperature in squares of half the second's gap.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    hot: float = 0.25
    cold: float = 0.1


STARTS = {
    (2, 2, True): Start((0.819,), (0.817,), 0.273, 0.106),
    (2, 2, False): Start((0.616,), (0.632,), 0.249, 0.104),
    (3, 2, False): Start((0.868,), (0.512,), 0.192, 0.090),
    (4, 2, False): Start((0.292, 1.251), (0.348,), 0.277, 0.119),
    (8, 2, False): Start((0.156, 0.563, 1.134, 1.983), (0.183,), 0.5, 0.116),
}


def start(first: int, second: int, *, half: bool) -> Start:
    """Return where annealing starts: tuned, else alphabets of equal gaps that share the power by their sizes."""
    tuned = STARTS.get((first, second, half))
    if tuned:
        return tuned
    share = 1 / (1 + (first / second) ** 2)
    halves = [standard_levels(count, 0.85 * power)[(count + 1) // 2 :].tolist()
              for count, power in ((first, 1 - share), (second, share))]
    return Start(tuple(halves[0]), tuple(halves[1]))
