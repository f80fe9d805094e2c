"""How attention over a compressed cache is cut into programs."""

from __future__ import annotations

import dataclasses

from tersor.ops.kv_attention.octets import UNIT
from tersor.ops.kv_attention.shapes import DENSE_TURN, ROWS, SIGN_TURN, TURN, WARPS, WORD_ROWS

PROGRAMS = 2  # of a multiprocessor, over closed tokens; three fit, and those over dense tokens are short
LEAST_TURNS = 3  # of a warp: beginning and ending cost as much as two or three
NEARBY, MOST_NEARBY = 8, 8  # dense tokens of a warp at a time; programs that share a head's
OCTET_LIMITS = ((3, 168), (2, 255))  # programs of a multiprocessor, registers of a thread; of wide heads
SIGN_LIMITS = ((256, 3, 168), (512, 2, 255))  # signs of a lane's queries, programs of a multiprocessor, registers


@dataclasses.dataclass(frozen=True)
class Division:
    """How work is cut.

    Attributes
    ----------
    splits : int
        Programs that share a head's closed tokens.
    dense : int
        Programs that share its others.
    rows : int
        Queries of a tile.
    turn : int
        Closed tokens that a warp takes at a time.
    """

    splits: int
    dense: int
    rows: int
    turn: int

    @property
    def parts(self) -> int:
        """Programs of a head."""
        return self.splits + self.dense


def sign_limits(signs: int) -> tuple[int, int]:
    """Return programs of a multiprocessor, and a thread's registers, where a lane's queries have so many signs."""
    return next((programs, registers) for most, programs, registers in SIGN_LIMITS if signs <= most)


def words_division(closed: int, dense: int, heads: int, rows: int, processors: int, warps: int) -> Division:
    """Return the division where bytes name words: tables fill a multiprocessor, so a program has one for itself.

    Programs over dense tokens come last; where they are a turn of their own, it counts as much as one and a half.
    """
    tile = next(one for one in ROWS if rows <= one)
    others, turns = -(-dense // (warps * DENSE_TURN)), -(-closed // (warps * TURN))
    room = processors // (heads * -(-rows // WORD_ROWS))
    ways = [(-(-turns // max(1, splits)) + cost, -splits) for splits, cost in ((room - others, 0.0), (room, 1.5))
            if splits > 0] or [(turns + 0.0, -1)]
    each = -(-turns // -min(ways)[1])
    return Division(-(-turns // each), others, tile, TURN)


def division_of(closed: int, dense: int, heads: int, rows: int, processors: int, *, signs: int = 0) -> Division:
    """Return the division for so many closed and dense tokens of `heads` heads of all sequences; `signs`, where met."""
    tile = next(one for one in ROWS if rows <= one)
    turn = SIGN_TURN if signs else TURN if tile < ROWS[-1] else TURN // 2
    others = -(-dense // (WARPS * DENSE_TURN))
    turns = -(-closed // (WARPS * turn))
    programs, least = (sign_limits(signs)[0], 1) if signs else (PROGRAMS, LEAST_TURNS)
    each = max(min(least, turns), -(-turns // max(1, programs * processors // heads)))
    return Division(-(-turns // each), others, tile, turn)


def streams_division(closed: int, dense: int, heads: int, rows: int, processors: int, signs: int) -> Division:
    """Return the division where one launch meets signs, so many of a lane's queries."""
    cut = division_of(closed, dense, heads, rows, processors, signs=signs)
    return dataclasses.replace(cut, dense=min(MOST_NEARBY, -(-dense // (WARPS * NEARBY))))


def octet_limits(dim: int) -> tuple[int, int]:
    """Return programs of a multiprocessor and a thread's registers, where codes are integers."""
    return OCTET_LIMITS[dim > 128]


def octets_division(closed: int, dense: int, heads: int, rows: int, dim: int, processors: int) -> Division:
    """Return the division where codes are integers: of one unit of tokens a turn or two, that which ends sooner.

    All programs over codes run at once. A unit alone counts 1.05 times one beside another, and each part of a head that
    is joined .05: set by hand, from times of both ways on an H200.
    """
    tile, room = next(one for one in ROWS if rows <= one), max(1, octet_limits(dim)[0] * processors // heads)
    ways = []
    for units in (1, 2) if dim <= 128 else (1,):
        turns = -(-closed // (WARPS * UNIT * units))
        each = -(-turns // room)
        splits = -(-turns // each)
        ways.append((each * units * (1.05 if units == 1 else 1.0) + 0.05 * splits, splits, units * UNIT))
    _, splits, turn = min(ways)
    return Division(splits, min(MOST_NEARBY, -(-dense // (WARPS * NEARBY))), tile, turn)
