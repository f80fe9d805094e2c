"""A walk through a trellis on the processor: many segments side by side, one a lane, so that inner loops are vectors'.

Rows of the metrics are states, columns are lanes. The loop over lanes has a fixed length, which is what makes a
compiler turn it into vector instructions; no loop depends on another lane, so bytes do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

LANES = 64


def _step(branches: int) -> Callable[..., None]:
    """Return one compiled step of `branches` new states a group."""
    lanes = LANES

    @numba.njit(nogil=True, boundscheck=False, fastmath={"contract", "nnan", "nsz"}, cache=True)
    def step(metric: Any, other: Any, choices: Any, x: Any, level: Any, groups: Any) -> None:
        best, chosen = np.empty(lanes, np.float32), np.empty(lanes, np.int32)
        stride = groups * lanes
        for group in range(groups):
            place = group * lanes
            for lane in range(lanes):
                best[lane] = metric[place + lane]
                chosen[lane] = 0
            for branch in range(1, branches):
                there = branch * stride + place
                for lane in range(lanes):
                    found = metric[there + lane]
                    less = found < best[lane]
                    chosen[lane] = branch if less else chosen[lane]
                    best[lane] = found if less else best[lane]
            for lane in range(lanes):
                choices[place + lane] = np.uint8(chosen[lane])
            for branch in range(branches):
                value = level[group * branches + branch]
                power, slope = value * value, np.float32(-2.0) * value
                there = (group * branches + branch) * lanes
                for lane in range(lanes):
                    other[there + lane] = best[lane] + (power + slope * x[lane])

    return step


_ONE, _TWO, _THREE, _FOUR, _FIVE = (_step(1 << shift) for shift in range(1, 6))  # compiled when they are first called


@numba.njit(nogil=True, boundscheck=False, cache=True)
def walk(problem: Any, start: Any, span: Any, work: Any, states: Any) -> None:
    """Write the states after every step of the best path over a span of places.

    Parameters
    ----------
    problem : (x, table, shifts, memory)
        float32 (length, LANES); float32 (period, 2**memory); int64 (period,); int.
    start : int64 (LANES,)
        The state to start and end in; -1: any.
    span : (first, count)
        The place to begin with, and how many follow, around the seam.
    work : (metric, other, choices)
        float32 (2**memory LANES,) twice; uint8 (count, groups LANES).
    states : int64 (count, LANES)
    """
    x, table, shifts, memory = problem
    first, count = span
    metric, other, choices = work
    length, period, lanes = x.shape[0], shifts.shape[0], x.shape[1]
    everywhere = 1 << memory
    if start[0] < 0:
        metric[:] = 0.0
    else:
        metric[:] = np.float32(1e30)
        for lane in range(lanes):
            metric[start[lane] * lanes + lane] = 0.0
    for t in range(count):
        now = (first + t) % length
        phase = now % period
        shift = shifts[phase]
        groups = everywhere >> shift
        if shift == 1:
            _ONE(metric, other, choices[t], x[now], table[phase], groups)
        elif shift == 2:
            _TWO(metric, other, choices[t], x[now], table[phase], groups)
        elif shift == 3:
            _THREE(metric, other, choices[t], x[now], table[phase], groups)
        elif shift == 4:
            _FOUR(metric, other, choices[t], x[now], table[phase], groups)
        else:
            _FIVE(metric, other, choices[t], x[now], table[phase], groups)
        metric, other = other, metric
    for lane in range(lanes):
        state = start[lane]
        if state < 0:
            state = 0
            for one in range(everywhere):
                if metric[one * lanes + lane] < metric[state * lanes + lane]:
                    state = one
        for t in range(count - 1, -1, -1):
            shift = shifts[((first + t) % length) % period]
            states[t, lane] = state
            group = state >> shift
            state = group + (np.int64(choices[t, group * lanes + lane]) << (memory - shift))
