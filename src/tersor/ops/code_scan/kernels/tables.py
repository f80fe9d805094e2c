"""Queries' tables on the processor: signed sums, and bytes that stand for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.code_scan.shapes import GROUP, MOST_BYTE, MOST_SUM, SLACK

BYTES, SUMS, MOVED, TOGETHER = MOST_BYTE, MOST_SUM, SLACK, GROUP
ABOVE = 1 + 2.0**-30  # of a step: sums of roundings stay below what a byte holds


@njit()
def rounded(tables: Any, each: int, weights: Any, peaks: Any, bytes_of: Any, lines: Any) -> None:
    """Round tables to bytes: a step for each query, and a least number for each table.

    Columns whose bytes are summed in a byte lie as far apart as can be: where the first ones have the largest numbers, as
    principal axes have, each has small ones beside it, and steps are short.

    Parameters
    ----------
    tables : float64 (queries, lookups, size)
    each : int
        Lookups of a column.
    weights : float64 (queries, n)
        Of offsets.
    peaks : tuple of float
        The largest factor of a row, and the largest magnitude of an offset.
    bytes_of : uint8 (queries, lookups, size), or of size 0
        Written, unless it is of size 0.
    lines : float64 (queries, LINE)
        Written, except the floor; see `scan`.
    """
    queries, lookups, size = tables.shape
    low, short, whole = np.empty(lookups), bytes_of.size > 0, lookups // each // TOGETHER
    within, up = np.empty(whole + 1), 0.5 if 2 * lookups < SUMS else 0.0  # to the nearest, where a sum has room for halves
    for query in range(queries if short else 0):
        span, total, largest = 0.0, 0.0, 0.0
        within[:] = 0.0
        for lookup in range(lookups):
            least, most = np.inf, -np.inf
            for place in range(size):
                least, most = min(least, tables[query, lookup, place]), max(most, tables[query, lookup, place])
            low[lookup] = least
            column = lookup // each
            within[column % whole if column < whole * TOGETHER else whole] += most - least
            span += most - least
            total += least
            largest += max(most, -least)
        step = max(within.max() / (BYTES - up * each * TOGETHER), span / (SUMS - up * lookups)) * ABOVE
        step = step if step > 0 else 1.0
        inverse = 1.0 / step
        wrong, below, top = 0.0, 0.0, 0
        for lookup in range(lookups):
            worst, least, peak = 0.0, 0.0, 0.0
            for place in range(size):
                above = tables[query, lookup, place] - low[lookup]
                number = np.floor(above * inverse + up)
                bytes_of[query, lookup, place] = np.uint8(number)
                peak = max(peak, number)
                worst, least = max(worst, above - number * step), min(least, above - number * step)
            wrong += worst
            below += worst - least
            top += peak
        weight = 0.0
        for place in range(weights.shape[1]):
            weight = max(weight, abs(weights[query, place]))
        lines[query, 0], lines[query, 1], lines[query, 2] = step, total + wrong, inverse
        lines[query, 3] = MOVED * (4 * peaks[0] * (largest + wrong) + peaks[1] * weight)
        lines[query, 5], lines[query, 6] = top, below


@njit()
def sum_signs(products: Any, sums: Any) -> None:
    """Write the sums of four signed numbers, (queries, bits), for every pattern of their signs, (queries, runs, 16)."""
    for query in range(products.shape[0]):
        for run in range(sums.shape[1]):
            least = 0.0
            for place in range(4 * run, min(4 * run + 4, products.shape[1])):
                least -= products[query, place]
            sums[query, run, 0] = least
            for bit in range(4):
                place = 4 * run + bit
                twice = 2.0 * products[query, place] if place < products.shape[1] else 0.0
                for pattern in range(1 << bit):
                    sums[query, run, pattern + (1 << bit)] = sums[query, run, pattern] + twice
