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
SIGNS_FROM = 8  # queries from which signs are multiplied on a GPU, and not looked up
SIGN_STEP = 64  # signs that are multiplied at a time
BOUND_TILES, SIGN_TILES, MOST_QUERIES, WARPS = 8, 2, 128, 8  # of a program that looks up, and of one that multiplies
MORE = 16  # tiles that are scored beside one for each row that is asked for
SOME_QUERIES = 1 << 15  # that a grid of programs has room for
SOME_ROWS = 1 << 22  # times queries, whose scores in float64 are held at a time
SOME_BOUNDS = 1 << 26  # tiles times queries, whose bounds are held at a time
STEP = 2.0**-22  # of a sum: what one addition of float32 may lose, and more, as tensor cores cut sums off
STEPS = 2.0**-21  # of a score's parts: what is lost where they are put together as float32
TINY = 2.0**-120  # what float32 may lose below its least normal number, many times over
CAPABILITY = (8, 0)  # of a GPU that Triton compiles for
SLACK = 2.0**-40  # of the largest score: what sums of float64 may be rounded by in some thousand steps


def refusal(capability: tuple[int, int]) -> str | None:
    """Return why a GPU of a compute capability has no kernels, or None where it has."""
    return None if capability >= CAPABILITY else (
        f"its kernels need compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, found {capability[0]}.{capability[1]}")


def columns_of(bits: int) -> int:
    """Return the bytes of a row of signs."""
    return -(-bits // 8)
