"""Queries' tables on the processor: signed sums, and bytes that stand for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.code_scan.shapes import FINEST

STEPS = FINEST


@njit()
def rounded(tables: Any, bytes_of: Any, lines: Any) -> None:
    """Round tables to bytes: a step for each query, and a least number for each table.

    Parameters
    ----------
    tables : float64 (queries, lookups, size)
    bytes_of : uint8 (queries, lookups, size)
        Written.
    lines : float64 (queries, 3)
        Written: the step, what a sum of least numbers is at most less than a score, and the size of sums.
    """
    queries, lookups, size = tables.shape
    low = np.empty(lookups)
    for query in range(queries):
        widest, total, largest = 0.0, 0.0, 0.0
        for lookup in range(lookups):
            least, most = np.inf, -np.inf
            for place in range(size):
                least, most = min(least, tables[query, lookup, place]), max(most, tables[query, lookup, place])
            low[lookup] = least
            widest = max(widest, most - least)
            total += least
            largest += max(most, -least)
        step = widest / STEPS if widest > 0 else 1.0
        inverse = 1.0 / step
        wrong = 0.0
        for lookup in range(lookups):
            worst = 0.0
            for place in range(size):
                above = tables[query, lookup, place] - low[lookup]
                number = np.floor(above * inverse + 0.5)
                bytes_of[query, lookup, place] = np.uint8(number)
                worst = max(worst, above - number * step)
            wrong += worst
        lines[query, 0], lines[query, 1], lines[query, 2] = step, total + wrong, largest + wrong


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
