"""A number for every window of a stream, on the processor: the window is the number's place in a table."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

ONE, EIGHTH, SEVEN = np.uint64(1), np.uint64(3), np.uint64(7)


@numba.njit(nogil=True, boundscheck=False, cache=True)
def look(packed: Any, table: Any, line: Any, rows: Any, out: Any) -> None:
    """Write rows of numbers.

    Parameters
    ----------
    packed : uint8 (n,)
    table : float32 (period, 2**memory)
        By windows whose oldest bit is the lowest.
    line : (shifts, sizes, memory)
        int64 (period,); int64 (segments,): numbers of each; int.
    rows : int64 (k,)
    out : float32 (k, width)
    """
    shifts, sizes, memory = line
    period, top, entering = shifts.shape[0], np.uint64(memory), shifts.astype(np.uint64)
    each, stream = shifts.sum(), 0
    for size in sizes:
        stream += size // period * each + shifts[: size % period].sum()
    for n in range(rows.shape[0]):
        bit, at = np.uint64(rows[n] * stream), 0
        for size in sizes:
            total = size // period * each + shifts[: size % period].sum()
            window = np.uint64(0)  # before the first number it is the circle's last bits
            for i in range(memory):
                place = bit + np.uint64(total - memory + i)
                window |= np.uint64(packed[place >> EIGHTH] >> (place & SEVEN) & 1) << np.uint64(i)
            byte = bit >> EIGHTH
            ready, held = np.uint64(packed[byte]) >> (bit & SEVEN), np.uint64(8) - (bit & SEVEN)  # bits read ahead
            phase = 0
            for t in range(at, at + size):
                shift = entering[phase]
                if held < shift:
                    byte += ONE
                    ready |= np.uint64(packed[byte]) << held
                    held += np.uint64(8)
                window = window >> shift | (ready & ((ONE << shift) - ONE)) << (top - shift)
                ready >>= shift
                held -= shift
                out[n, t] = table[phase, window]
                phase = phase + 1 if phase + 1 < period else 0
            bit += np.uint64(total)
            at += size


@numba.njit(nogil=True, boundscheck=False, cache=True)
def look_across(packed: Any, table: Any, line: Any, rows: Any, out: Any) -> None:
    """Write rows across streams that run along columns; a window is moved on where rows follow one another.

    Parameters
    ----------
    packed, table, line : see `look`; bits are (stream, width), and sizes those of a column
    rows : int64 (k,)
        Places in a column.
    out : float32 (k, width)
    """
    shifts, sizes, memory = line
    period, each, width = shifts.shape[0], shifts.sum(), out.shape[1]
    top, window, known = np.uint64(memory - 1), np.zeros(width, np.uint64), np.int64(-1)
    for n in range(rows.shape[0]):
        segment, start, bit = 0, np.int64(0), np.int64(0)
        while rows[n] >= start + sizes[segment]:
            start += sizes[segment]
            bit += sizes[segment] // period * each + shifts[: sizes[segment] % period].sum()
            segment += 1
        size, t = sizes[segment], rows[n] - start
        total = size // period * each + shifts[: size % period].sum()
        entered = t // period * each + shifts[: t % period + 1].sum()
        count = shifts[t % period] if t and known == rows[n] - 1 else memory
        for i in range(entered - count, entered):
            place = (bit + i % total) * width
            for c in range(width):
                at = np.uint64(place + c)
                new = np.uint64(packed[at >> EIGHTH] >> (at & SEVEN) & 1)
                window[c] = window[c] >> ONE | new << top
        numbers = table[t % period]
        for c in range(width):
            out[n, c] = numbers[window[c]]
        known = rows[n]
