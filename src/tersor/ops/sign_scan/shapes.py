"""How signs lie in memory for a scan, and how queries are cut into planes."""

from __future__ import annotations

TILE = 64  # rows side by side: a loop of fixed length over them is what becomes vector instructions
WORD = 32  # bits
GROUP = 4  # planes that are handled together
RUN = 4  # signs whose sums are looked up together
CLOSE = 1024  # bits times rows asked for, beyond which four planes let too many rows through
SLACK = 2.0**-20  # of the largest score: bounds are computed in float32, with at most eight roundings of 2**-24


def words_of(bits: int) -> int:
    """Return the words of a row."""
    return -(-bits // WORD)


def planes_of(bits: int, k: int) -> int:
    """Return the bit planes that a query is rounded to: what is fastest; results do not depend on it.

    Steps over six standard deviations, `2**p` of them, move a score of `n` signs by at most some `n / 4` steps, which
    is `1.5 sqrt(n) / 2**p` of the scores' own deviations. Near the best of a million, a deviation holds some `e**4`
    times as many rows: all that are within the bound are looked at closely.
    """
    return GROUP if bits * k <= CLOSE else 2 * GROUP
