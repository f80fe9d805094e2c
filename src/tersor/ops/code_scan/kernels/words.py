"""The scan of codes of more than 256 words on the processor: looked up one by one, without a bound."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.code_scan.kernels.heaps import keep
from tersor.ops.code_scan.kernels.lanes import bytes_at, floats_at, longs_at, shorts_at
from tersor.ops.code_scan.shapes import TILE

TILE_ROWS = TILE


@njit()
def scan_words(pieces: Any, visits: Any, queries: Any, columns: Any, found: Any) -> None:
    """Do as `scan` does for codes of more than 256 words, int16 in memory: every score is computed."""
    starts, who, terms = visits
    lines, tables = queries
    scores, ids, filled = found
    every, sums = filled.shape[1] == 1, np.empty(TILE_ROWS)
    for piece in range(pieces.shape[0]):
        count = pieces[piece, 4]
        tiles = (count + TILE_ROWS - 1) // TILE_ROWS
        held = numba.carray(shorts_at(pieces[piece, 0]), (tiles, columns, TILE_ROWS))
        factors = numba.carray(floats_at(pieces[piece, 1]), (count,))
        offsets = numba.carray(floats_at(pieces[piece, 2]), (count,))
        numbers = numba.carray(longs_at(pieces[piece, 3]), (count,))
        masked = pieces[piece, 5] != 0
        mask = numba.carray(bytes_at(pieces[piece, 5]), (count,))
        for tile in range(tiles):
            start = tile * TILE_ROWS
            for visit in range(starts[piece, 0], starts[piece, 1]):
                query = who[visit]
                for row in range(TILE_ROWS):
                    sums[row] = 0.0
                for column in range(columns):
                    table = tables[query, column]
                    for row in range(TILE_ROWS):
                        sums[row] += table[held[tile, column, row]]
                for row in range(start, min(count, start + TILE_ROWS)):
                    if masked and mask[row] == 0:
                        continue
                    score = factors[row] * sums[row - start] + offsets[row] * terms[visit, 1] + terms[visit, 0]
                    if not every or score >= lines[query, 4]:
                        keep(scores[query], ids[query], filled[query], score, numbers[row])
