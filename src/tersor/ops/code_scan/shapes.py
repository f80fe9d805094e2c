"""How codes lie in memory for a scan, and the sizes of what they are looked up in."""

from __future__ import annotations

TILE = 64  # rows side by side: a byte of each fills the widest register there is
NIBBLE, BYTE = 16, 256  # numbers of a table: of half a byte of a row, or of a whole one; longer ones are not bounded
SIGNS = 4  # of a half byte, whose signed sum is looked up
FLUSH = 128  # bytes of a row after which sums of bytes are widened: 256 lookups of 255 fit 16 bits
SLACK = 2.0**-20  # of the largest score: bounds are computed in float32, with at most eight roundings of 2**-24
FINEST = 255  # steps of a rounded table


def columns_of(bits: int) -> int:
    """Return the bytes of a row of signs."""
    return -(-bits // 8)
