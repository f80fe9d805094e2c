"""Filters between lines and streams: a program makes a block of one row, every thread some numbers of it."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@triton.jit
def bits_until(phase, SHIFTS: tl.constexpr):
    """Bits that have entered before a phase."""
    total = phase * 0
    for p in tl.static_range(len(SHIFTS)):
        total += tl.where(phase > p, SHIFTS[p], 0)
    return total


@triton.jit
def segment_of(unit, units, count, length, UNIT: tl.constexpr):
    """The first number of the segment that a unit lies in, and how many it has; see `shapes.segments`."""
    index = tl.minimum(((unit + 1) * count - 1) // units, count - 1)
    start = UNIT * (index * units // count)
    end = tl.where(index == count - 1, length, UNIT * ((index + 1) * units // count))
    return start, end - start


@triton.jit
def bits_of(size, SHIFTS: tl.constexpr, STEP: tl.constexpr):
    """Bits of so many numbers from the beginning of a period."""
    return size // len(SHIFTS) * STEP + bits_until(size % len(SHIFTS), SHIFTS)


@kernel
@triton.jit
def numbers(signs, taps, scales, out, length, stream, units, count, UNIT: tl.constexpr, SHIFTS: tl.constexpr,
            STEP: tl.constexpr, MEMORY: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, AGES: tl.constexpr):
    """Lines (n, length) of streams (n, stream): each number from the signs of its window, AGES at a time.

    All that a number needs is asked for at once, and what the kernel before does not write before it has ended.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = place < length
    start, size = segment_of(tl.minimum(place, length - 1) // UNIT, units, count, length, UNIT)
    own = place - start
    phase = own % len(SHIFTS)
    newest = own // len(SHIFTS) * STEP + bits_until(phase + 1, SHIFTS) - 1
    total = bits_of(size, SHIFTS, STEP)
    near = signs + row * stream + start // len(SHIFTS) * STEP
    age = tl.arange(0, AGES)[None, :]
    seen = inside[:, None] & (age < MEMORY)
    tap = tl.load(taps + phase[:, None] * MEMORY + age, seen, other=0.0)
    scale = tl.load(scales + place, inside, other=0.0).to(tl.float32) if SCALED else tl.full((BLOCK,), 1.0, tl.float32)
    bit = newest[:, None] - age
    bit = tl.where(bit < 0, bit + total[:, None], bit)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()  # the kernel before may still write what is filtered
    value = tl.sum(tap * tl.load(near[:, None] + bit, seen, other=0.0).to(tl.float32), 1) * scale
    tl.store(out + row * length + place, value.to(out.dtype.element_ty), inside)


@kernel
@triton.jit
def filtered(lines, taps, out, length, stream, units, count, UNIT: tl.constexpr, SHIFTS: tl.constexpr,
             STEP: tl.constexpr, MEMORY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, AGES: tl.constexpr):
    """What the signs of streams meet, (n, stream), of lines (n, length): each sign's from the STEPS that see it."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = place < stream
    unit = tl.minimum(place, stream - 1) // (UNIT // len(SHIFTS) * STEP)
    start, size = segment_of(unit, units, count, length, UNIT)
    own = place - start // len(SHIFTS) * STEP
    total = bits_of(size, SHIFTS, STEP)
    rest = own % STEP
    first = own // STEP * len(SHIFTS)
    for p in tl.static_range(len(SHIFTS) - 1):  # the number that the bit entered with
        first += tl.where(rest >= bits_until(p + 1 + rest * 0, SHIFTS), 1, 0)
    # from the last to the first: of rising ones Triton 3.6 compares one in two with the end, and takes it for both
    later = (AGES - 1 - tl.arange(0, AGES))[None, :]
    at = first[:, None] + later
    turned = at >= size[:, None]
    at = tl.where(turned, at - size[:, None], at)
    phase = at % len(SHIFTS)
    age = (at // len(SHIFTS) * STEP + bits_until(phase + 1, SHIFTS) - 1 + tl.where(turned, total[:, None], 0)
           - own[:, None])
    seen = inside[:, None] & (later < STEPS) & (age < MEMORY)
    tap = tl.load(taps + phase * MEMORY + age, seen, other=0.0)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()  # the kernel before may still write what is filtered
    value = tl.sum(tap * tl.load(lines + row * length + start[:, None] + at, seen, other=0.0).to(tl.float32), 1)
    tl.store(out + row * stream + place, value.to(out.dtype.element_ty), inside)
