"""The best path on the processor: many segments side by side, one a lane, so that every inner loop is a vector's.

Rows of the metrics are states, columns are lanes. The loop over lanes has a fixed length, which is what makes a
compiler turn it into vector instructions; no loop depends on another lane, so bytes do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter
from tersor.codecs.trellis.viterbi import WARM, bits_of, values

LANES = 64


def encode(code: Filter, numbers: Tensor) -> Tensor:
    """Return the bits of tail-biting segments, uint8 (n, bits), for float32 numbers (n, length) on the processor."""
    count, length = numbers.shape
    walk = _walker(len(code.shifts))
    table, shifts = values(code).numpy(), np.array(code.shifts, dtype=np.int64)
    warm = min(WARM, length // 2)
    states = np.empty((length, LANES), np.int64)
    work = _Work(code.memory, min(code.shifts), length)
    out = torch.empty(count, code.bits(length), dtype=torch.uint8)
    for first in range(0, count, LANES):
        part = numbers[first : first + LANES]
        x = np.zeros((length, LANES), np.float32)
        x[:, : len(part)] = part.numpy().T
        start = np.full(LANES, -1, np.int64)
        walk(x, table, shifts, code.memory, start, length - warm, 2 * warm, *work.arrays, states)
        start = states[warm - 1].copy()
        walk(x, table, shifts, code.memory, start, 0, length, *work.arrays, states)
        out[first : first + len(part)] = bits_of(code, torch.from_numpy(states.T[: len(part)].copy()))
    return out


class _Work:
    """Arrays that walks write: metrics before and after a step, and every group's choice at every step."""

    def __init__(self, memory: int, least: int, length: int) -> None:
        states = (1 << memory) * LANES
        self.arrays = (np.empty(states, np.float32), np.empty(states, np.float32),
                       np.empty((length + 2 * WARM, states >> least), np.uint8))


@cache
def _walker(period: int) -> Callable[..., None]:
    """Return the compiled walk; steps are compiled for each number of new bits."""
    steps = {shift: _step(1 << shift) for shift in range(1, 9)}
    one, two, three, four, five = (steps[shift] for shift in range(1, 6))
    del period

    @numba.njit(nogil=True, boundscheck=False, cache=False)
    def walk(x: Any, table: Any, shifts: Any, memory: Any, start: Any, first: Any, count: Any, metric: Any, other: Any,
             choices: Any, states: Any) -> None:
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
                one(metric, other, choices[t], x[now], table[phase], groups)
            elif shift == 2:
                two(metric, other, choices[t], x[now], table[phase], groups)
            elif shift == 3:
                three(metric, other, choices[t], x[now], table[phase], groups)
            elif shift == 4:
                four(metric, other, choices[t], x[now], table[phase], groups)
            else:
                five(metric, other, choices[t], x[now], table[phase], groups)
            metric, other = other, metric
        for lane in range(lanes):
            state = start[lane]
            if state < 0:
                state = 0
                for one_state in range(everywhere):
                    if metric[one_state * lanes + lane] < metric[state * lanes + lane]:
                        state = one_state
            for t in range(count - 1, -1, -1):
                shift = shifts[((first + t) % length) % period]
                states[t, lane] = state
                group = state >> shift
                state = group + (np.int64(choices[t, group * lanes + lane]) << (memory - shift))

    return walk


def _step(branches: int) -> Callable[..., None]:
    """Return one compiled step of `branches` new states a group."""
    lanes = LANES

    @numba.njit(nogil=True, boundscheck=False, fastmath={"contract", "nnan", "nsz"}, cache=False)
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
