"""Walks through a trellis on the processor: one segment after the other, vectors of states within a step.

A walk keeps the costs of all groups at all steps (see `advance`) and no choices: on the way back, the few states that
could have come before are costed again, exactly as they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit
from tersor.ops.trellis_path.kernels.advance import MOST_SHIFT, WIDTH, advance


@njit()
def _advance_singly(bests: Any, levels: Any, x: Any, places: Any, shifts: Any) -> None:
    """Do what `advance` does, for windows too short for its vectors, and for more new bits."""
    old, level, new = places
    before, after, groups = shifts
    for group in range(groups):
        least = np.float32(np.inf)
        for branch in range(1 << after):
            state = branch * groups + group
            off = x - levels[level + state]
            least = min(least, bests[old + (state >> before)] + off * off)
        bests[new + group] = least


@njit()
def _least(bests: Any, levels: Any, x: Any, places: Any, shifts: Any) -> Any:
    """Return the state that costs least after a step, of the group `places[2]`; see `advance`."""
    old, level, group = places
    before, after, groups = shifts
    found, least = group, np.float32(np.inf)
    for branch in range(1 << after):
        state = branch * groups + group
        off = x - levels[level + state]
        cost = bests[old + (state >> before)] + off * off
        less = cost < least
        found = state if less else found
        least = cost if less else least
    return found


@njit()
def _walk(x: Any, problem: Any, span: Any, bests: Any, states: Any, start: Any) -> Any:
    """Follow the best path over `span`, (first place, steps, steps to write); return the state before those written.

    It starts and ends in the state `start`; -1: in any.
    """
    levels, shifts, memory = problem
    first, count, kept = span
    length, period, everywhere = x.shape[0], shifts.shape[0], 1 << memory
    row, now, phase = bests.shape[0] // (count + 1), first, first % period
    after = shifts[phase]
    groups = everywhere >> after
    bests[:groups] = 0.0
    if start >= 0:
        bests[:groups] = np.inf
        bests[start & (groups - 1)] = 0.0
    for t in range(count):
        before, number = after, x[now]
        places = (row * t, phase << memory, row * (t + 1))
        now, phase = now + 1, phase + 1
        if now == length:
            now, phase = 0, 0
        if phase == period:
            phase = 0
        after = shifts[phase]
        groups = everywhere >> after
        if groups >= WIDTH and max(before, after) <= MOST_SHIFT:
            advance(bests, levels, number, places, (before, after, groups))
        else:
            _advance_singly(bests, levels, number, places, (before, after, groups))
    state = start
    for t in range(count, count - kept, -1):
        now, then = (first + t - 1) % length, (first + t) % length
        before, after = shifts[now % period], shifts[then % period]
        groups = everywhere >> after
        if t < count or start < 0:
            group = np.argmin(bests[row * t : row * t + groups]) if t == count else state >> after
            state = _least(bests, levels, x[now], (row * (t - 1), (now % period) << memory, group),
                           (before, after, groups))
        states[t - 1 - (count - kept)] = state
    return state


@njit()
def walk(numbers: Any, problem: Any, warm: Any, bests: Any, states: Any) -> None:
    """Write the states after every step of the best tail-biting paths.

    Parameters
    ----------
    numbers : float32 (n, length)
    problem : (levels, shifts, memory)
        The number that every window gives, float32 (period 2**memory,); int64 (period,); int.
    warm : int
        Steps on either side of the seam that find the state there; 0: the whole segment does.
    bests : float32 ((steps + 1) groups,)
        Room for the longer walk.
    states : int64 (n, length)
    """
    length, none = numbers.shape[1], np.int64(0)  # of one type with all other numbers, or walks are compiled for each
    first, steps, kept = (length - warm, 2 * warm, warm + 1) if warm else (none, length, none + 1)
    for i in range(numbers.shape[0]):
        start = _walk(numbers[i], problem, (first, steps, kept), bests, states[i], none - 1)
        _walk(numbers[i], problem, (none, length, length), bests, states[i], start)
