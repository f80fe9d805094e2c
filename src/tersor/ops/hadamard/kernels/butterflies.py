"""Rotations of few vectors on the processor: the left factor row by row, then butterflies."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit

CLOSE = 16  # numbers between which butterflies are unrolled


@njit()
def rotate(x: Any, signs: Any, left: Any, scale: Any, out: Any) -> None:
    """Write rotated vectors.

    Parameters
    ----------
    x, out : float32 (vectors, width)
    signs : float32 (width,)
    left : float32 (rows, rows)
        The left factor; Sylvester's matrix of order `width / rows`, a power of two, is the right one.
    scale : float32
        What Sylvester's matrix is multiplied by.
    """
    rows, width = left.shape[0], x.shape[1]
    columns = width // rows
    held = np.empty(width, np.float32)
    for vector in range(x.shape[0]):
        to = out[vector]
        if rows == 1:
            for i in range(width):
                to[i] = x[vector, i] * signs[i] * scale
        else:
            for i in range(width):
                held[i] = x[vector, i] * signs[i] * scale
            _left(held, left, columns, to)
        _right(to, columns)


@njit()
def _left(held: Any, left: Any, columns: Any, to: Any) -> None:
    rows = left.shape[0]
    for row in range(rows):
        one = to[row * columns : (row + 1) * columns]
        one[:] = np.float32(0.0)
        for other in range(rows):
            weight, start = left[row, other], other * columns
            for i in range(columns):
                one[i] += weight * held[start + i]


@njit()
def _right(to: Any, columns: Any) -> None:
    """Turn every run of `columns` numbers: far apart first, where neighbours make registers."""
    width, reach = to.shape[0], columns >> 1
    while reach >= CLOSE:
        for start in range(0, width, 2 * reach):
            one, other = to[start : start + reach], to[start + reach : start + 2 * reach]
            for i in range(reach):
                total, rest = one[i] + other[i], one[i] - other[i]
                one[i] = total
                other[i] = rest
        reach >>= 1
    while reach:
        for start in range(0, width, 2 * reach):
            for i in range(start, start + reach):
                total, rest = to[i] + to[i + reach], to[i] - to[i + reach]
                to[i] = total
                to[i + reach] = rest
        reach >>= 1
