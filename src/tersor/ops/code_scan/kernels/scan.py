"""The scan on the processor: sums of rounded tables bound scores from above, and few rows are looked at closely.

Arrays go in as addresses, in tuples of numbers: references of arrays are counted, which takes longer than a tile.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.code_scan.kernels.heaps import keep, replace
from tersor.ops.code_scan.kernels.lanes import (
    bytes_at,
    doubles_at,
    floats_at,
    highest,
    longs_at,
    lowest_bit,
    reaching,
    shorts_at,
    sum_many,
    sum_one,
)
from tersor.ops.code_scan.shapes import BYTE, EDGES, LINE, MANY, NEAR, NIBBLE, SAMPLE, SAMPLED, TILE

HALVES, TABLE, HALF = NIBBLE, BYTE, TILE // 2
TILE_ROWS, QUERIES, TILES, NUMBERS, OF_TILE = TILE, MANY, NEAR, LINE, EDGES
MOST_STEP, FEWEST = SAMPLE, SAMPLED
PLACES = 7  # numbers of a piece
BASES = 2.0**-48  # of a base: what adding it to scores may round away
NOBODY = np.iinfo(np.int64).max  # an id that comes after all


@njit()
def least_of(line: Any, term: Any, floor: float, edges: Any) -> float:
    """Return what a sum of bytes must be for a row of a tile to reach a floor: -1 where none does.

    `line` is that of a query, `term` are base and weight; `edges` are numbers of a tile; see `scan`.
    """
    base, weight = term
    wanted = floor - base - line[3] - BASES * abs(base) - max(weight * edges[2], weight * edges[3])
    value = (wanted * (edges[0] if wanted > 0 else edges[1]) - line[1]) * line[2]
    return -1 if value > line[5] else np.int64(np.ceil(value)) if value > 0 else 0


@njit()
def _least_of_all(line: Any, term: Any, floor: float, limits: Any, span: Any, least: Any) -> None:
    """Write what `least_of` says of each tile of a span, whose edges lie side by side, float64 (4, TILES): in vectors."""
    base, weight = term
    wanted, level, inverse, top = floor - base - line[3] - BASES * abs(base), line[1], line[2], line[5]
    for tile in range(span[0], span[1]):
        more = wanted - max(weight * limits[2 * TILES + tile], weight * limits[3 * TILES + tile])
        value = (more * (limits[tile] if more > 0 else limits[TILES + tile]) - level) * inverse
        number = np.int64(np.ceil(value if value > 0 else 0.0)) if value <= top else -1
        least[tile] = 0 if value != value else number


@njit()
def _product(codes: Any, columns: Any, tables: Any, halves: bool) -> float:
    """Return the sum of a row's lookups: of its first byte's address, and of a query's tables' address."""
    total, held = 0.0, bytes_at(codes)
    looked = doubles_at(tables)
    if halves:
        for column in range(columns):
            byte = held[column * TILE_ROWS]
            total += looked[2 * HALVES * column + np.int64(byte & np.uint8(15))]
            total += looked[2 * HALVES * column + HALVES + np.int64(byte >> np.uint8(4))]
    else:
        for column in range(columns):
            total += looked[TABLE * column + np.int64(held[column * TILE_ROWS])]
    return total


@njit()
def look(piece: Any, tile: int, columns: Any, bits: Any, total: Any, visit: Any, own: Any) -> None:
    """Score rows of a tile that may reach the floor of a query, and keep those that do.

    Everything is an address or a number: references of arrays are counted, which takes longer than the rest. `piece`
    are the numbers of a piece; `bits` name rows, whose sums lie at `total`; `visit` are base and weight; `own` are what
    `own_of` gives.
    """
    (base, weight), (line_at, tables, scores_at, ids_at, filled_at, size, every, halves) = visit, own
    line, factors, offsets = doubles_at(line_at), floats_at(piece[1]), floats_at(piece[2])
    mask, first, count = bytes_at(piece[5]), piece[0] + tile * columns * TILE_ROWS, piece[4]
    slack, sums = line[3] + BASES * abs(base), shorts_at(total)
    scores = numba.carray(doubles_at(scores_at), (size,))
    ids = numba.carray(longs_at(ids_at), (size,))
    filled = numba.carray(longs_at(filled_at), (every,))
    while bits != 0:
        bit = lowest_bit(bits)
        bits &= bits - 1
        inside = 2 * bit if bit < HALF else 2 * (bit - HALF) + 1
        row = tile * TILE_ROWS + inside
        if row >= count or (piece[5] != 0 and mask[row] == 0):
            continue
        share = offsets[row] * weight + base
        upper = factors[row] * (line[1] + line[0] * sums[bit]) + share + slack
        if upper < (line[4] if every else scores[0]):
            continue
        number = longs_at(piece[3])[row]  # far away in memory: it is on its way while the sum is computed
        score = factors[row] * _product(first + inside, columns, tables, halves) + share
        if not every or score >= line[4]:
            keep(scores, ids, filled, score, number)


@njit()
def own_of(query: Any, queries: Any, found: Any) -> Any:
    """Return a query's own addresses: of its line, tables, scores, ids and count; then k, whether all are kept, halves.

    `queries` and `found` are addresses of what `scan` takes, and sizes.
    """
    (lines, tables, each, halves), (scores, ids, filled, size, every) = queries, found
    return (lines + 8 * NUMBERS * query, tables + 8 * each * query, scores + 8 * size * query, ids + 8 * size * query,
            filled + 8 * query, size, every, halves)


@njit()
def addresses_of(queries: Any, found: Any) -> Any:
    """Return addresses and sizes of the arrays of `scan`, as `own_of` takes them."""
    (_, lines, tables), (scores, ids, filled) = queries, found
    return ((np.int64(lines.ctypes.data), np.int64(tables.ctypes.data), tables.shape[1] * tables.shape[2],
             tables.shape[2] == HALVES),
            (np.int64(scores.ctypes.data), np.int64(ids.ctypes.data), np.int64(filled.ctypes.data), scores.shape[1],
             filled.shape[1]))


@njit()
def _beside(edges: Any, begin: int, end: int, limits: Any) -> None:
    """Lay the edges of some tiles side by side, (tiles, 4) to (4, TILES)."""
    for tile in range(begin, end):
        for place in range(4):
            limits[place * TILES + tile - begin] = edges[4 * tile + place]


@njit()
def _sums(codes: Any, rough: Any, who: Any, some: int, columns: int, halves: bool, sums: Any) -> None:
    """Write the sums of a tile for one query or for four: `who` is the address of their numbers, `rough` of all bytes."""
    number, (table, each) = longs_at(who), rough
    if some == QUERIES:
        sum_many(codes, (table + number[0] * each, table + number[1] * each, table + number[2] * each,
                         table + number[3] * each), columns, halves, sums)
    else:
        sum_one(codes, table + number[0] * each, columns, halves, sums)


@njit()
def _sure_of(line: Any, term: Any, most: int, edges: Any) -> float:
    """Return what the best row of a tile scores at least: that of the largest sum of bytes."""
    base, weight = term
    value = line[1] - line[6] + line[0] * most
    least = value / (edges[1] if value > 0 else edges[0]) + min(weight * edges[2], weight * edges[3]) + base
    return least - 2 * (line[3] + BASES * abs(base))


@njit()
def _seeded(rough: Any, visits: Any, queries: Any, columns: Any, found: Any, sums: Any) -> None:
    """Fill heaps with what the k-th best surely scores: by the best row of some tiles, spread over all rows.

    So the first rows are not looked at one and all. Who looks at a piece looks at all of it.
    """
    count, piece_at, starts_at, who_at, terms_at = visits
    starts, who, terms, size = longs_at(starts_at), longs_at(who_at), doubles_at(terms_at), found[3]
    tiles, sampled = 0, 0
    for number in range(count):
        tiles += longs_at(piece_at + 8 * PLACES * number)[4] // TILE_ROWS
    step = max(1, min(MOST_STEP, tiles // max(FEWEST, 4 * size)))
    for number in range(count):
        sampled += (longs_at(piece_at + 8 * PLACES * number)[4] // TILE_ROWS + step - 1) // step
    if sampled < 2 * size:
        return
    for number in range(count):
        piece, visit, last = longs_at(piece_at + 8 * PLACES * number), starts[2 * number], starts[2 * number + 1]
        while visit < last:
            some = QUERIES if last - visit >= QUERIES else 1
            for tile in range(0, piece[4] // TILE_ROWS, step):
                _sums(piece[0] + tile * columns * TILE_ROWS, rough, who_at + 8 * visit, some, columns,
                      queries[3], sums)
                for place in range(some):
                    own, other = own_of(who[visit + place], queries, found), visit + place
                    sure = _sure_of(doubles_at(own[0]), (terms[2 * other], terms[2 * other + 1]),
                                    highest(sums + 2 * TILE_ROWS * place), doubles_at(piece[6] + 8 * OF_TILE * tile))
                    if sure > doubles_at(own[2])[0]:
                        replace(numba.carray(doubles_at(own[2]), (size,)), numba.carray(longs_at(own[3]), (size,)), sure,
                                np.int64(NOBODY))
            visit += some
    for visit in range(starts[0], starts[1]):
        scores = doubles_at(own_of(who[visit], queries, found)[2])
        for place in range(1, size):
            scores[place] = scores[0]


@njit()
def _scan(rough: Any, visits: Any, queries: Any, columns: Any, found: Any, room: Any) -> None:
    """See `scan`: of addresses only, and sizes; `room` is for sums, edges, and least sums."""
    count, piece_at, starts_at, who_at, terms_at = visits
    (sums, limits_at, least_at), starts, who, terms = room, longs_at(starts_at), longs_at(who_at), doubles_at(terms_at)
    limits, least = doubles_at(limits_at), longs_at(least_at)
    for number in range(count):
        piece = longs_at(piece_at + 8 * PLACES * number)
        tiles, edges = (piece[4] + TILE_ROWS - 1) // TILE_ROWS, doubles_at(piece[6])
        for begin in range(0, tiles, TILES):
            end, visit, last = min(tiles, begin + TILES), starts[2 * number], starts[2 * number + 1]
            _beside(edges, begin, end, limits)
            while visit < last:
                some = QUERIES if last - visit >= QUERIES else 1
                for place in range(some):
                    own = own_of(who[visit + place], queries, found)
                    line, floor = doubles_at(own[0]), doubles_at(own[2])[0]
                    _least_of_all(line, (terms[2 * (visit + place)], terms[2 * (visit + place) + 1]),
                                  line[4] if own[6] else floor, limits, (np.int64(0), end - begin),
                                  longs_at(least_at + 8 * TILES * place))
                for tile in range(begin, end):
                    wanted = least[tile - begin]
                    for place in range(1, some):
                        wanted = max(wanted, least[TILES * place + tile - begin])
                    if wanted < 0:
                        continue
                    codes = piece[0] + tile * columns * TILE_ROWS
                    _sums(codes, rough, who_at + 8 * visit, some, columns, queries[3], sums)
                    for place in range(some):
                        floor = least[TILES * place + tile - begin]
                        bits = reaching(sums + 2 * TILE_ROWS * place, floor) if floor >= 0 else 0
                        if bits == 0:
                            continue
                        own = own_of(who[visit + place], queries, found)
                        term, line = (terms[2 * (visit + place)], terms[2 * (visit + place) + 1]), doubles_at(own[0])
                        before = doubles_at(own[2])[0]
                        look(piece, tile, columns, bits, sums + 2 * TILE_ROWS * place, term, own)
                        after = doubles_at(own[2])[0]
                        if not own[6] and after > before:
                            _least_of_all(line, term, after, limits, (tile + 1 - begin, end - begin),
                                          longs_at(least_at + 8 * TILES * place))
                visit += some


@njit()
def scan(pieces: Any, visits: Any, queries: Any, columns: Any, found: Any, whole: bool) -> None:
    """Keep the best rows, of so many columns, of every piece for every query, or all rows that reach a floor.

    Parameters
    ----------
    pieces : int64 (pieces, 7)
        Addresses of codes (tiles, columns, TILE), of factors, offsets and ids (count,); count; address of a mask or 0;
        address of edges, float64 (tiles, 4): the inverse of the largest and of the least factor of a tile, and its
        least and its largest offset.
    visits : (starts, who, terms)
        int64 (pieces, 2), (visits,): from which visit to which each piece has, and whose they are; float64 (visits, 2):
        base, and weight of offsets.
    queries : (bytes, lines, tables)
        uint8 (queries, lookups, size); float64 (queries, LINE): step and level of the bound, the inverse of the step,
        what may be rounded away, a floor, the largest sum of bytes, and what the level adds for rounding tables; float64 (queries, lookups, size).
    found : (scores, ids, filled)
        float64 and int64 (queries, k): heaps; int64 (queries, 0), or (queries, 1): all that reach the floor are kept,
        and counted here, beyond k, too.
    whole : bool
        Whether the same queries look at every piece, at all of its rows, for the best k.
    """
    (starts, who, terms), (rough, _, _) = visits, queries
    sums, limits, least = (np.empty(QUERIES * TILE_ROWS, np.uint16), np.empty(OF_TILE * TILES),
                           np.empty(QUERIES * TILES, np.int64))
    own, held = addresses_of(queries, found)
    given = np.int64(rough.ctypes.data), rough.shape[1] * rough.shape[2]
    turns = (len(pieces), np.int64(pieces.ctypes.data), np.int64(starts.ctypes.data), np.int64(who.ctypes.data),
             np.int64(terms.ctypes.data))
    if whole and len(pieces) > 0:
        _seeded(given, turns, own, columns, held, np.int64(sums.ctypes.data))
    _scan(given, turns, own, columns, held,
          (np.int64(sums.ctypes.data), np.int64(limits.ctypes.data), np.int64(least.ctypes.data)))
