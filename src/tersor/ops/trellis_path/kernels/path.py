"""The best path through a bit-shift trellis: one program walks one segment, its metrics in registers.

A step takes the least of the `2**k` states of a group before, and gives as many after; see `codecs/trellis/viterbi.py`.
What every group chose is written out, and followed back at the end. A first walk over the seam finds the state at it,
which the second walk starts and ends with: the tail bites.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@triton.jit
def _step(metric, level, x, choices, STATES: tl.constexpr, SHIFT: tl.constexpr):
    # [STATES] metrics before to those after; what every group chose goes to choices[: STATES >> SHIFT]
    groups: tl.constexpr = STATES >> SHIFT
    branches: tl.constexpr = 1 << SHIFT
    best, choice = tl.min(tl.reshape(metric, (branches, groups)), axis=0, return_indices=True)
    tl.store(choices + tl.arange(0, groups), choice.to(tl.uint8))
    spread = tl.reshape(tl.broadcast_to(best[:, None], (groups, branches)), (STATES,))
    return spread + level * (level - 2.0 * x)


@triton.jit
def _forward(metric, x, step, choices, l0, l1, l2, l3, STATES: tl.constexpr, STRIDE: tl.constexpr,
             PERIOD: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr):
    # one period of steps, the first of which is number `step` of the walk
    for p in tl.static_range(PERIOD):
        number = tl.load(x + p)
        place = choices + (step + p) * STRIDE
        if p == 0:
            metric = _step(metric, l0, number, place, STATES, S0)
        elif p == 1:
            metric = _step(metric, l1, number, place, STATES, S1)
        elif p == 2:
            metric = _step(metric, l2, number, place, STATES, S2)
        else:
            metric = _step(metric, l3, number, place, STATES, S3)
    return metric


@triton.jit
def _before(state, choices, MEMORY: tl.constexpr, SHIFT: tl.constexpr):
    # the state before a step, from the state after it and what its group chose
    group = state >> SHIFT
    return group + (tl.load(choices + group).to(tl.int32) << (MEMORY - SHIFT))


@triton.jit
def _backward(state, step, out, choices, STORE: tl.constexpr, STRIDE: tl.constexpr, MEMORY: tl.constexpr,
              PERIOD: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr):
    # from the state after one period of steps to that before it
    for q in tl.static_range(PERIOD):
        if STORE:
            tl.store(out + (PERIOD - 1 - q), state)
        place = choices + (step + (PERIOD - 1 - q)) * STRIDE
        if PERIOD - 1 - q == 0:
            state = _before(state, place, MEMORY, S0)
        elif PERIOD - 1 - q == 1:
            state = _before(state, place, MEMORY, S1)
        elif PERIOD - 1 - q == 2:
            state = _before(state, place, MEMORY, S2)
        else:
            state = _before(state, place, MEMORY, S3)
    return state


@kernel
@triton.jit(do_not_specialize=["first"])
def path(numbers, table, choices, states, first, each, LENGTH: tl.constexpr, MEMORY: tl.constexpr, WARM: tl.constexpr,
         STRIDE: tl.constexpr, PERIOD: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
         S3: tl.constexpr):
    """Write the states after every step, int32 (n, LENGTH), of segments (n, LENGTH); a program a segment.

    `each` segments after another share a table (PERIOD, 2**MEMORY).
    """
    count: tl.constexpr = 1 << MEMORY
    own = tl.program_id(0).to(tl.int64)
    x = numbers + (first + own) * LENGTH
    out = states + (first + own) * LENGTH
    chosen = choices + own * ((LENGTH + 2 * WARM) * STRIDE)
    index = tl.arange(0, count)
    level = table + (first + own) // each * (PERIOD * count) + index
    l0 = tl.load(level)
    l1 = tl.load(level + (1 % PERIOD) * count)
    l2 = tl.load(level + (2 % PERIOD) * count)
    l3 = tl.load(level + (3 % PERIOD) * count)
    metric = tl.zeros((count,), tl.float32)
    for t in range(0, 2 * WARM, PERIOD):
        place = tl.where(t < WARM, LENGTH - WARM + t, t - WARM)
        metric = _forward(metric, x + place, t, chosen, l0, l1, l2, l3, count, STRIDE, PERIOD, S0, S1, S2, S3)
    seam = tl.argmin(metric, 0).to(tl.int32)
    tl.debug_barrier()
    for i in range(0, WARM, PERIOD):
        seam = _backward(seam, 2 * WARM - PERIOD - i, out, chosen, False, STRIDE, MEMORY, PERIOD, S0, S1, S2, S3)
    metric = tl.where(index == seam, 0.0, 1e30)
    chosen += 2 * WARM * STRIDE
    for t in range(0, LENGTH, PERIOD):
        metric = _forward(metric, x + t, t, chosen, l0, l1, l2, l3, count, STRIDE, PERIOD, S0, S1, S2, S3)
    tl.debug_barrier()
    state = seam
    for i in range(0, LENGTH, PERIOD):
        t = LENGTH - PERIOD - i
        state = _backward(state, t, out + t, chosen, True, STRIDE, MEMORY, PERIOD, S0, S1, S2, S3)
