"""One query, from its numbers to ids, in one call: between calls more time is lost than in most."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.code_scan.kernels.heaps import replace, sort_best
from tersor.ops.code_scan.kernels.lanes import doubles_at, highest, longs_at, one_halves, reaching
from tersor.ops.code_scan.kernels.scan import BASES, addresses_of, least_of, look, own_of
from tersor.ops.code_scan.kernels.tables import rounded, sum_signs
from tersor.ops.code_scan.shapes import EDGES, LINE, METRICS, NIBBLE, TILE

TABLE, EACH, NUMBERS, TILE_ROWS, EDGES_OF = NIBBLE, 2, LINE, TILE, EDGES
L2, COSINE = METRICS.index("l2"), METRICS.index("cosine")
FEWEST = 16  # tiles that are looked at first; as many as rows that are asked for, where those are more
WORST = float(np.finfo(np.float32).max)


@njit()
def _bounded(pieces: Any, rough: Any, lines: Any, term: Any, columns: int, bounds: Any, best: Any) -> None:
    """Write what no row of each tile scores above, and keep the tiles of the largest such bounds: a heap of places."""
    total = np.empty((2, TILE_ROWS // 2), np.uint16)
    sums, table, place = np.int64(total.ctypes.data), np.int64(rough.ctypes.data), np.int64(0)
    step, level, (base, weight) = lines[0, 0], lines[0, 1], term
    beyond = lines[0, 3] + base + BASES * abs(base)
    for piece in range(len(pieces)):
        tiles = (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
        edges = numba.carray(doubles_at(pieces[piece, 6]), (tiles, 4))
        for tile in range(tiles):
            one_halves(pieces[piece, 0] + tile * columns * TILE_ROWS, (table,), columns, sums)
            value = level + step * highest(sums)
            bound = value / (edges[tile, 0] if value > 0 else edges[tile, 1]) + beyond
            bound += max(weight * edges[tile, 2], weight * edges[tile, 3])
            bounds[place] = bound
            if bound > best[0][0]:
                replace(best[0], best[1], bound, place)
            place += 1


@njit()
def _looked(piece: Any, tile: int, columns: int, rough: Any, term: Any, own: Any, sums: Any) -> None:
    """Score the rows of a tile that may reach the floor, and keep those that do; `piece` and `own` as `look` has them."""
    edges = doubles_at(piece[6] + 8 * EDGES_OF * tile)
    least = least_of(doubles_at(own[0]), term, doubles_at(own[2])[0], edges)
    if least < 0:
        return
    one_halves(piece[0] + tile * columns * TILE_ROWS, (rough,), columns, sums)
    bits = reaching(sums, least)
    if bits != 0:
        look(piece, tile, columns, bits, sums, term, own)


@njit()
def _scanned(pieces: Any, columns: int, queries: Any, term: Any, found: Any) -> None:
    """Do as `scan` does for one query, the most promising tiles first: then few rows of others reach the floor."""
    count = 0
    for piece in range(len(pieces)):
        count += (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
    first = min(count, max(FEWEST, found[0].shape[1]))
    bounds, best = np.empty(count), (np.full(first, -np.inf), np.zeros(first, np.int64))
    own, total = own_of(0, *addresses_of(queries, found)), np.empty(TILE_ROWS, np.uint16)
    rough, sums = np.int64(queries[0].ctypes.data), np.int64(total.ctypes.data)
    _bounded(pieces, queries[0], queries[1], term, columns, bounds, best)
    for turn in range(2):
        place = 0
        for piece in range(len(pieces)):
            tiles = (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
            here = longs_at(np.int64(pieces.ctypes.data) + 8 * pieces.shape[1] * piece)
            if turn == 1:
                for tile in range(tiles):
                    if bounds[place + tile] >= found[0][0, 0]:
                        _looked(here, tile, columns, rough, term, own, sums)
            else:
                for promising in best[1]:
                    if place <= promising < place + tiles:
                        _looked(here, promising - place, columns, rough, term, own, sums)
                        bounds[promising] = -np.inf
            place += tiles


@njit()
def _posed(query: Any, mean: Any, size: int, metric: int, held: Any) -> Any:
    """Write what meets codes, float32 (dim,); return a base and a weight, and what scores are taken back to distances by.

    That is the squared norm, and the exponent of the power of two that scores are multiplied by. By L2 it is beyond
    `size` where the query is longer.
    """
    peak, norm, shared = np.float32(0), np.float32(0), 0.0
    for place in range(len(held)):
        held[place] = query[0, place] - mean[place] if metric == L2 else query[0, place]
        peak = max(peak, abs(held[place]))
    exponent = math.frexp(peak)[1]
    scale = np.float32(2.0 ** -(size if metric == L2 else exponent))
    for place in range(len(held)):
        held[place] *= scale
        norm += held[place] * held[place]
    if metric == L2:
        power = 0.0
        for place in range(len(held)):
            power += np.float64(held[place]) * held[place]
        return (0.0, 1.0), power, max(size, exponent)
    if metric == COSINE and norm > 0:
        for place in range(len(held)):
            held[place] *= np.float32(1) / np.sqrt(norm)
    for place in range(len(held)):
        shared += np.float64(held[place]) * mean[place]
    return ((0.0, shared), 0.0, 0) if metric == COSINE else ((shared, 1.0), 0.0, exponent)


@njit()
def alone(query: Any, mean: Any, matrix: Any, how: Any, pieces: Any, peaks: Any, columns: int, found: Any) -> bool:
    """Write the distances or scores, and ids, of the best rows; return whether the query lies within their power of two.

    Parameters
    ----------
    query : float32 (1, dim)
    mean : float32 (dim,)
        What all vectors have in common.
    matrix : float32 (dim, bits)
        Takes queries to what signs are multiplied by.
    how : (int, int)
        Rows are divided by two to the power of the first; the second is a place in `METRICS`. See `frames.lines` for what
        rows have by each.
    pieces, peaks, columns
        See `scan` and `rounded`.
    found : float32 (1, k) and int64 (1, k)
    """
    (size, metric), (dim, bits), (distances, ids) = how, matrix.shape, found
    products, held = np.zeros((1, bits), np.float32), np.empty(dim, np.float32)
    term, power, exponent = _posed(query, mean, size, metric, held)
    if metric == L2 and exponent > size:
        return False
    for place in range(dim):
        number = held[place]
        for bit in range(bits):
            products[0, bit] += number * matrix[place, bit]
    tables, rough, lines = (np.empty((1, 2 * columns, TABLE)), np.empty((1, 2 * columns, TABLE), np.uint8),
                            np.empty((1, NUMBERS)))
    sum_signs(products, tables)
    lines[0, 4] = -np.inf
    rounded(tables, EACH, np.full((1, 1), term[1]), peaks, rough, lines)
    scores, kept = np.full((1, 1, ids.shape[1]), -np.inf), np.full((1, 1, ids.shape[1]), np.iinfo(np.int64).max)
    _scanned(pieces, columns, (rough, lines, tables), term, (scores[0], kept[0], np.empty((1, 0), np.int64)))
    best = np.empty(ids.shape)
    sort_best(scores, kept, best, ids)
    for place in range(ids.shape[1]):
        if metric == L2:
            distances[0, place] = min(max((power - 2 * best[0, place]) * 2.0 ** (2 * size), 0.0), WORST)
        else:
            distances[0, place] = min(max(best[0, place] * 2.0**exponent, -WORST), WORST)
    return True
