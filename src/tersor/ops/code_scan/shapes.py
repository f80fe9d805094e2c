"""How codes lie in memory for a scan, and the sizes of what they are looked up in."""

from __future__ import annotations

TILE = 64  # rows side by side: a byte of each fills the widest register there is
NIBBLE, BYTE = 16, 256  # numbers of a table: of half a byte of a row, or of a whole one; longer ones are not bounded
SIGNS = 4  # of a half byte, whose signed sum is looked up
GROUP = 4  # columns of a row whose lookups are summed in bytes: a quarter of all apart
NEAR = 16  # tiles that queries meet in turn: those and the tables lie in the nearest cache
MANY = 4  # queries that meet a tile together, so that its bytes are read once
EDGES = 4  # numbers that say between what the factors and offsets of a tile lie
LINE, FLOOR = 7, 4  # numbers that bound the scores of a query, and the place of its floor
MOST_BYTE, MOST_SUM = 255, 65_535  # of the lookups of a group together, and of a row
SAMPLE, SAMPLED = 64, 64  # of so many tiles one says what the best rows score at least; of few tiles, at least so many
LEAST_WORK = 1 << 20  # bytes of codes times queries that are worth a thread: some tenths of a millisecond
METRICS = ("l2", "ip", "cosine")  # what one query alone may ask for
SLACK = 2.0**-40  # of the largest score: what sums of float64 may be rounded by in some thousand steps


def columns_of(bits: int) -> int:
    """Return the bytes of a row of signs."""
    return -(-bits // 8)
