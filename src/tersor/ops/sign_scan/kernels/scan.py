"""The scan on the processor: counts of bits bound every score from above, and few rows are looked at closely.

A tile's rows lie side by side, one word of each after the other, and the loops over them have a fixed length: a
compiler makes vector instructions of them. Where the machine counts bits in vectors, so does the loop.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.sign_scan.shapes import TILE

TILE_ROWS = TILE


@intrinsic
def ones(typing: Any, word: Any) -> Any:
    """Count the bits of a word that are set."""
    del typing

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.ctpop(arguments[0])

    return word(word), generate


@intrinsic
def _words_at(typing: Any, address: Any) -> Any:
    """Return an address as a pointer to uint32."""
    del typing
    return types.CPointer(types.uint32)(address), _to_pointer


@intrinsic
def _floats_at(typing: Any, address: Any) -> Any:
    """Return an address as a pointer to float32."""
    del typing
    return types.CPointer(types.float32)(address), _to_pointer


def _to_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


@njit()
def _count(tile: Any, planes: Any, total: Any) -> None:
    """Write the products of a tile's bits (words, TILE) with planes (groups, words, 4), the last of all negative."""
    for row in range(TILE_ROWS):
        total[row] = 0
    last = planes.shape[0] - 1
    for group in range(planes.shape[0]):
        low, high = np.int32(4 * group), np.int32(-1 if group == last else 1)
        for word in range(planes.shape[1]):
            first, second, third, fourth = (planes[group, word, 0], planes[group, word, 1], planes[group, word, 2],
                                            planes[group, word, 3])
            for row in range(TILE_ROWS):
                held = tile[word, row]
                found = (np.int32(ones(held & first)) + (np.int32(ones(held & second)) << np.int32(1))
                         + (np.int32(ones(held & third)) << np.int32(2))
                         + high * (np.int32(ones(held & fourth)) << np.int32(3)))
                total[row] += found << low


@njit()
def _bound(total: Any, factors: Any, offsets: Any, line: Any, upper: Any) -> None:
    """Write what the scores of a tile's rows are at most; of those that there are, which may be fewer."""
    slope, level, weight = np.float32(line[0]), np.float32(line[1]), np.float32(line[2])
    if factors.shape[0] == TILE_ROWS:
        for row in range(TILE_ROWS):
            upper[row] = factors[row] * (slope * np.float32(total[row]) + level) + offsets[row] * weight
    else:
        for row in range(factors.shape[0]):
            upper[row] = factors[row] * (slope * np.float32(total[row]) + level) + offsets[row] * weight
        upper[factors.shape[0] :] = -np.inf


@njit()
def _any_above(upper: Any, floor: Any) -> bool:
    """Tell whether any bound reaches the floor, or is no number: float32 may have overflowed."""
    found = np.int32(0)
    for row in range(TILE_ROWS):
        found |= np.int32(not upper[row] < floor)
    return found != 0


@njit()
def _product(tile: Any, row: Any, sums: Any) -> float:
    """Return the product of a row's signs with a query, from its sums over runs of signs."""
    total = 0.0
    for word in range(tile.shape[0]):
        held = tile[word, row]
        for place in range(8):
            total += sums[8 * word + place, held >> np.uint32(4 * place) & np.uint32(15)]
    return total


@njit()
def _replace(scores: Any, ids: Any, score: float, number: int) -> None:
    """Put a row in the place of the worst: the root of a heap whose parents are worse than their children."""
    size, place = scores.shape[0], 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (scores[other] < scores[child]
                             or (scores[other] == scores[child] and ids[other] > ids[child])):
            child = other
        if scores[child] > score or (scores[child] == score and ids[child] < number):
            break
        scores[place], ids[place] = scores[child], ids[child]
        place = child
    scores[place], ids[place] = score, number


@njit()
def sums_of(products: Any, sums: Any) -> None:
    """Write the sums of four signed numbers for every pattern of their signs, (queries, runs, 16)."""
    for query in range(products.shape[0]):
        for run in range(sums.shape[1]):
            for pattern in range(16):
                total = 0.0
                for place in range(4):
                    number = products[query, 4 * run + place]
                    total += number if pattern >> place & 1 else -number
                sums[query, run, pattern] = total


@njit()
def scan(pieces: Any, queries: Any, words: Any, found: Any) -> None:
    """Keep the best rows of every piece for every query.

    Parameters
    ----------
    pieces : int64 (pieces, 5)
        Addresses of words (tiles, words, TILE), of factors and of offsets (count,); count; the id of the first row.
    queries : (planes, lines, sums)
        uint32 (queries, groups, words, 4); float64 (queries, 4): slope and level of the bound, weight of offsets, and
        what float32 may lose; float64 (queries, runs, 16).
    words : int
        Words of a row.
    found : (scores, ids)
        float64 and int64 (queries, k): heaps, which are replaced.
    """
    planes, lines, sums = queries
    scores, ids = found
    total, upper = np.empty(TILE_ROWS, np.int32), np.empty(TILE_ROWS, np.float32)
    for piece in range(pieces.shape[0]):
        count, first = pieces[piece, 3], pieces[piece, 4]
        tiles = (count + TILE_ROWS - 1) // TILE_ROWS
        held = numba.carray(_words_at(pieces[piece, 0]), (tiles, words, TILE_ROWS))
        factors = numba.carray(_floats_at(pieces[piece, 1]), (count,))
        offsets = numba.carray(_floats_at(pieces[piece, 2]), (count,))
        for tile in range(tiles):
            start = tile * TILE_ROWS
            stop = min(count, start + TILE_ROWS)
            for query in range(planes.shape[0]):
                _count(held[tile], planes[query], total)
                _bound(total, factors[start:stop], offsets[start:stop], lines[query], upper)
                slack, weight = lines[query, 3], lines[query, 2]
                if not _any_above(upper, np.float32(scores[query, 0] - slack)):
                    continue
                for row in range(stop - start):
                    if upper[row] < scores[query, 0] - slack:
                        continue
                    score = (factors[start + row] * _product(held[tile], row, sums[query])
                             + offsets[start + row] * weight)
                    if score > scores[query, 0]:
                        _replace(scores[query], ids[query], score, first + start + row)
