"""Paths that end in known states, followed back through what groups chose: a program takes many segments."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@kernel
@triton.jit(do_not_specialize=["begin", "programs", "length", "count", "until", "room"])
def back(choices, seams, states, begin, programs, length, count, until, room, MEMORY: tl.constexpr,
         SHIFTS: tl.constexpr, MIDDLE: tl.constexpr, LOW: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr):
    """Follow walks of `count` steps back, from the states in `seams` after the last one to those after step `until`.

    Parameters
    ----------
    choices
        int32 (programs, room): MIDDLE words a step, of what the groups of states chose that the next step leads to.
    seams
        int32 (programs,): states; where not STORE, those of step `until` are written there.
    states
        int32 (n, length): where STORE, the states after every step, from row `begin` on.
    """
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = own < programs
    state = tl.load(seams + own, inside, other=0)
    out = states + (begin + own) * length
    if STORE:
        tl.store(out + (count - 1), state, inside)
    for i in range(0, count - 1 - until):
        t = count - 2 - i
        phase = (t + 1) % len(SHIFTS)
        shift = tl.full((BLOCK,), SHIFTS[0], tl.int32)
        for p in tl.static_range(1, len(SHIFTS)):
            shift = tl.where(phase == p, SHIFTS[p], shift)
        group = state >> shift
        word = tl.load(choices + own * room + t * MIDDLE + group // LOW % MIDDLE, inside, other=0)
        place = group // (MIDDLE * LOW) * LOW + group % LOW
        state = group + ((word >> (shift * place) & ((1 << shift) - 1)) << (MEMORY - shift))
        if STORE:
            tl.store(out + t, state, inside)
    if not STORE:
        tl.store(seams + own, state, inside)
