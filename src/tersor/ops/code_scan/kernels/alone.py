"""One query by squared distance, from its numbers to ids, in one call: between calls more time is lost than in most."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.code_scan.kernels.heaps import replace, sort_best
from tersor.ops.code_scan.kernels.scan import doubles_at, highest, least_of, longs_at, look, one_halves, reaching
from tersor.ops.code_scan.kernels.tables import rounded, sum_signs
from tersor.ops.code_scan.shapes import GROUP, LINE, NIBBLE, TILE

TABLE, RUN, NUMBERS, TILE_ROWS = NIBBLE, 2 * GROUP, LINE, TILE
FEWEST = 16  # tiles that are looked at first; as many as rows that are asked for, where those are more
WORST = float(np.finfo(np.float32).max)


@njit()
def _bounded(pieces: Any, rough: Any, lines: Any, columns: int, bounds: Any, best: Any) -> None:
    """Write what no row of each tile scores above, and keep the tiles of the largest such bounds: a heap of places."""
    total = np.empty((2, TILE_ROWS // 2), np.uint16)
    sums, table, place = np.int64(total.ctypes.data), np.int64(rough.ctypes.data), 0
    step, level, slack = lines[0, 0], lines[0, 1], lines[0, 3]
    for piece in range(len(pieces)):
        tiles = (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
        edges = numba.carray(doubles_at(pieces[piece, 6]), (tiles, 4))
        for tile in range(tiles):
            one_halves(pieces[piece, 0] + tile * columns * TILE_ROWS, (table,), columns, sums)
            value = level + step * highest(sums)
            bound = value / (edges[tile, 0] if value > 0 else edges[tile, 1]) + edges[tile, 3] + slack
            bounds[place] = bound
            if bound > best[0][0]:
                replace(best[0], best[1], bound, place)
            place += 1


@njit()
def _looked(pieces: Any, piece: int, tile: int, columns: int, queries: Any, found: Any) -> None:
    """Score the rows of a tile that may reach the floor, and keep those that do."""
    total = np.empty((2, TILE_ROWS // 2), np.uint16)
    sums, (rough, lines, _) = np.int64(total.ctypes.data), queries
    tiles = (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
    edges = numba.carray(doubles_at(pieces[piece, 6]), (tiles, 4))
    least = least_of(lines, 0, (0.0, 1.0), found[0][0, 0], edges, tile)
    if least < 0:
        return
    one_halves(pieces[piece, 0] + tile * columns * TILE_ROWS, (np.int64(rough.ctypes.data),), columns, sums)
    bits = reaching(sums, least)
    if bits != 0:
        here = longs_at(np.int64(pieces.ctypes.data) + 8 * pieces.shape[1] * piece)
        look((here, tile), columns, bits, sums, (0, 0.0, 1.0), queries, found)


@njit()
def _scanned(pieces: Any, columns: int, queries: Any, found: Any) -> None:
    """Do as `scan` does for one query, the most promising tiles first: then few rows of others reach the floor."""
    count = 0
    for piece in range(len(pieces)):
        count += (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
    first = min(count, max(FEWEST, found[0].shape[1]))
    bounds, best = np.empty(count), (np.full(first, -np.inf), np.zeros(first, np.int64))
    _bounded(pieces, queries[0], queries[1], columns, bounds, best)
    for turn in range(2):
        place = 0
        for piece in range(len(pieces)):
            tiles = (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
            if turn == 1:
                for tile in range(tiles):
                    if bounds[place + tile] >= found[0][0, 0]:
                        _looked(pieces, piece, tile, columns, queries, found)
            else:
                for promising in best[1]:
                    if place <= promising < place + tiles:
                        _looked(pieces, piece, promising - place, columns, queries, found)
                        bounds[promising] = -np.inf
            place += tiles


@njit()
def alone(query: Any, mean: Any, matrix: Any, size: int, pieces: Any, peaks: Any, columns: int, found: Any) -> bool:
    """Write the squared distances and ids of the nearest rows; return whether the query lies within `2**size`.

    Parameters
    ----------
    query : float32 (1, dim)
    mean : float32 (dim,)
        Taken off the query.
    matrix : float32 (dim, bits)
        Takes queries to what signs are multiplied by.
    size : int
        Rows and queries are divided by `2**size`.
    pieces, peaks, columns
        See `scan` and `rounded`. Offsets are minus half of squared norms.
    found : float32 (1, k) and int64 (1, k)
    """
    (dim, bits), (distances, ids) = matrix.shape, found
    products, scale = np.zeros((1, bits), np.float32), np.float32(2.0**-size)
    power = 0.0
    for place in range(dim):
        number = (query[0, place] - mean[place]) * scale
        if not abs(number) < 1:
            return False
        power += np.float64(number) * number
        for bit in range(bits):
            products[0, bit] += number * matrix[place, bit]
    tables, rough, lines = (np.empty((1, 2 * columns, TABLE)), np.empty((1, 2 * columns, TABLE), np.uint8),
                            np.empty((1, NUMBERS)))
    sum_signs(products, tables)
    lines[0, 4] = -np.inf
    rounded(tables, RUN, np.ones((1, 1)), peaks, rough, lines)
    scores, held = np.full((1, 1, ids.shape[1]), -np.inf), np.full((1, 1, ids.shape[1]), np.iinfo(np.int64).max)
    _scanned(pieces, columns, (rough, lines, tables), (scores[0], held[0], np.empty((1, 0), np.int64)))
    best = np.empty(ids.shape)
    sort_best(scores, held, best, ids)
    back = 2.0 ** (2 * size)
    for place in range(ids.shape[1]):
        distances[0, place] = min(max((power - 2 * best[0, place]) * back, 0.0), WORST)
    return True
