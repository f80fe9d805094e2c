"""What a path means: the bits that entered at every step, and the numbers of its windows."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@kernel
@triton.jit(do_not_specialize=["length", "stream"])
def entered(states, table, bits, numbers, length, stream, STATES: tl.constexpr, SHIFTS: tl.constexpr,
            STEP: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Write uint8 (n, stream) and float32 (n, length) for states int32 (n, length); a program a part of a segment."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    state = tl.load(states + row * length + place, inside, other=0)
    phase = place % len(SHIFTS)
    tl.store(numbers + row * length + place, tl.load(table + phase * STATES + state, inside, other=0.0), inside)
    first = bits + row * stream + place // len(SHIFTS) * STEP
    for p in tl.static_range(len(SHIFTS)):
        for age in tl.static_range(MOST):
            there = first + SHIFTS[p] - 1 - age
            tl.store(there, (state >> age & 1).to(tl.uint8), inside & (phase == p) & (age < SHIFTS[p]))
        first += SHIFTS[p]
