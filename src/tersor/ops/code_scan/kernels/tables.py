"""Queries' tables on the processor: signed sums, and bytes that stand for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.code_scan.shapes import MOST_BYTE, MOST_SUM, SLACK

BYTES, SUMS, MOVED = MOST_BYTE, MOST_SUM, SLACK
ABOVE = 1 + 2.0**-30  # of a step: sums of roundings stay below what a byte holds


@njit()
def rounded(tables: Any, group: int, weights: Any, peaks: Any, bytes_of: Any, lines: Any) -> None:
    """Round tables down to bytes: a step for each query, and a least number for each table.

    Parameters
    ----------
    tables : float64 (queries, lookups, size)
    group : int
        Lookups whose bytes are summed in a byte.
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
    low, short = np.empty(lookups), bytes_of.size > 0
    for query in range(queries if short else 0):
        widest, within, whole, total, largest = 0.0, 0.0, 0.0, 0.0, 0.0
        for lookup in range(lookups):
            least, most = np.inf, -np.inf
            for place in range(size):
                least, most = min(least, tables[query, lookup, place]), max(most, tables[query, lookup, place])
            low[lookup] = least
            within = most - least + (within if lookup % group else 0.0)
            widest = max(widest, within)
            whole += most - least
            total += least
            largest += max(most, -least)
        step = max(widest / BYTES, whole / SUMS) * ABOVE
        step = step if step > 0 else 1.0
        inverse = 1.0 / step
        wrong, top = 0.0, 0
        for lookup in range(lookups):
            worst, peak = 0.0, 0.0
            for place in range(size):
                above = tables[query, lookup, place] - low[lookup]
                number = np.floor(above * inverse)
                bytes_of[query, lookup, place] = np.uint8(number)
                peak = max(peak, number)
                worst = max(worst, above - number * step)
            wrong += worst
            top += peak
        weight = 0.0
        for place in range(weights.shape[1]):
            weight = max(weight, abs(weights[query, place]))
        lines[query, 0], lines[query, 1], lines[query, 2] = step, total + wrong, inverse
        lines[query, 3] = MOVED * (4 * peaks[0] * (largest + wrong) + peaks[1] * weight)
        lines[query, 5], lines[query, 6] = top, wrong


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
