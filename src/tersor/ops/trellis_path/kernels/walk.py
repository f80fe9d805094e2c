"""A walk through a trellis on the processor: many segments side by side, one a lane, so that inner loops are vectors'.

Rows of the metrics are states, columns are lanes. The loop over lanes has a fixed length, which is what makes a
compiler turn it into vector instructions; no loop depends on another lane, so bytes do not depend on threads. Where
there are few segments, loops run over states and lanes together, branch by branch, and are put in order afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

LANES, FEW = 64, 8


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
                slope, power = level[0, group * branches + branch], level[1, group * branches + branch]
                there = (group * branches + branch) * lanes
                for lane in range(lanes):
                    other[there + lane] = best[lane] + (power + slope * x[lane])

    return step


def _step_few(branches: int) -> Callable[..., None]:
    """Return one compiled step for few lanes; `level` is by branch, then group, once a lane."""
    lanes = FEW

    @numba.njit(nogil=True, boundscheck=False, fastmath={"contract", "nnan", "nsz"}, cache=True)
    def step(metric: Any, other: Any, choices: Any, x: Any, level: Any, groups: Any) -> None:
        size = groups * lanes
        best, cost, tiled = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
        for group in range(groups):
            for lane in range(lanes):
                tiled[group * lanes + lane] = x[lane]
        for i in range(size):
            least, chosen = metric[i], 0
            for branch in range(1, branches):
                found = metric[branch * size + i]
                less = found < least
                chosen = branch if less else chosen
                least = found if less else least
            best[i] = least
            choices[i] = np.uint8(chosen)
        slopes, powers = level[0], level[1]
        for branch in range(branches):
            for i in range(size):
                cost[i] = best[i] + (powers[branch * size + i] + slopes[branch * size + i] * tiled[i])
            for group in range(groups):
                for lane in range(lanes):
                    other[(group * branches + branch) * lanes + lane] = cost[group * lanes + lane]

    return step


_ONE, _TWO, _THREE, _FOUR, _FIVE = (_step(1 << shift) for shift in range(1, 6))  # compiled when they are first called
_ONE_FEW, _TWO_FEW, _THREE_FEW, _FOUR_FEW, _FIVE_FEW = (_step_few(1 << shift) for shift in range(1, 6))


@numba.njit(nogil=True, boundscheck=False, cache=True)
def _take(shift: Any, metric: Any, other: Any, choices: Any, x: Any, level: Any, groups: Any) -> None:
    few = x.shape[0] == FEW
    if shift == 1:
        if few:
            _ONE_FEW(metric, other, choices, x, level, groups)
        else:
            _ONE(metric, other, choices, x, level, groups)
    elif shift == 2:
        if few:
            _TWO_FEW(metric, other, choices, x, level, groups)
        else:
            _TWO(metric, other, choices, x, level, groups)
    elif shift == 3:
        if few:
            _THREE_FEW(metric, other, choices, x, level, groups)
        else:
            _THREE(metric, other, choices, x, level, groups)
    elif shift == 4:
        if few:
            _FOUR_FEW(metric, other, choices, x, level, groups)
        else:
            _FOUR(metric, other, choices, x, level, groups)
    else:
        if few:
            _FIVE_FEW(metric, other, choices, x, level, groups)
        else:
            _FIVE(metric, other, choices, x, level, groups)


@numba.njit(nogil=True, boundscheck=False, cache=True)
def walk(problem: Any, start: Any, span: Any, work: Any, states: Any) -> None:
    """Write the states after every step of the best path over a span of places.

    Parameters
    ----------
    problem : (x, table, shifts, memory)
        float32 (length, lanes), `LANES` of them or `FEW`; `levels` of the table; int64 (period,); int.
    start : int64 (lanes,)
        The state to start and end in; -1: any.
    span : (first, count)
        The place to begin with, and how many follow, around the seam.
    work : (metric, other, choices)
        float32 (2**memory lanes,) twice; uint8 (count, groups lanes).
    states : int64 (count, lanes)
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
        _take(shift, metric, other, choices[t], x[now], table[phase], groups)
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


def levels(table: np.ndarray, shifts: np.ndarray, lanes: int) -> np.ndarray:
    """Return -2 times every window's number, and its square, in the order in which steps for so many lanes read them.

    Parameters
    ----------
    table : float32 (period, 2**memory)
    """
    both = np.stack([np.float32(-2.0) * table, table * table], 1)
    if lanes != FEW:
        return both
    turned = [one.reshape(2, -1, 1 << shift).swapaxes(1, 2).reshape(2, -1).repeat(FEW, 1)
              for one, shift in zip(both, shifts, strict=True)]
    return np.stack(turned)
