"""Beams on CUDA: a program walks one segment; see `beam.reference` for what a step means.

Survivors are in the order of their bits, newest first, and stay so: windows that agree in what stays are neighbours, at
most as many as bits that leave can tell apart. So nothing is sorted or hashed. The last bin to take is found two bits of
its number at a time; where a candidate goes follows from how many are taken before it.

Products and sums are rounded one by one, as on the processor, so paths are the reference's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel

BIN = tl.constexpr(18)  # bits of a cost that do not tell bins apart
FOLD = tl.constexpr(65535)
NONE = tl.constexpr(8191)  # the bin of what is no candidate: above infinity's
ROUNDS = tl.constexpr(7)  # of two bits of a bin
FIELD = tl.constexpr(20)  # bits of a count


@triton.jit
def _shift_of(phase, SHIFTS: tl.constexpr):
    shift = SHIFTS[0] + 0 * phase
    for p in tl.static_range(1, len(SHIFTS)):
        shift = tl.where(phase == p, SHIFTS[p], shift)
    return shift


@triton.jit
def _merged(windows, costs, keep, i, alive, BRANCHES: tl.constexpr):
    # survivors' kept bits, which are the first of their group, its least cost, and whose that is
    kept = tl.load(windows + i, i < alive, other=0) & keep
    least = tl.load(costs + i, i < alive, other=0.0)
    before = tl.load(windows + (i - 1), (i > 0) & (i < alive), other=0) & keep
    leads = (i < alive) & ((i == 0) | (before != kept))
    who = i
    for d in tl.static_range(1, BRANCHES):
        there = i + d < alive
        cost = tl.load(costs + i + d, there, other=0.0)
        less = there & ((tl.load(windows + i + d, there, other=0) & keep) == kept) & (cost < least)
        least = tl.where(less, cost, least)
        who = tl.where(less, i + d, who)
    return kept, leads, least, who


@triton.jit
def _last_bin(bins, WIDTH: tl.constexpr):
    # the highest bin that fewer than WIDTH candidates are below
    found = 0
    for turn in tl.static_range(ROUNDS):
        step = 1 << 2 * (ROUNDS - 1 - turn)
        below = (bins < found + step).to(tl.int64) + ((bins < found + 2 * step).to(tl.int64) << FIELD)
        below += (bins < found + 3 * step).to(tl.int64) << 2 * FIELD
        counts = tl.sum(tl.sum(below, axis=0), axis=0)
        for place in tl.static_range(3):
            fewer = (counts >> place * FIELD & ((1 << FIELD) - 1)) < WIDTH
            found += tl.where(fewer, step, 0)
    return tl.minimum(found, NONE)


@triton.jit
def _places(bins, last, WIDTH: tl.constexpr):
    # which candidates are taken, and where each goes: those of the last bin in their order, as many as there is room for
    less = (bins < last).to(tl.int32)
    edge = ((bins == last) & (bins != NONE)).to(tl.int32)
    both = less + (edge << 16)
    rows = tl.sum(both, axis=1)
    before = tl.cumsum(both, axis=1) - both + (tl.cumsum(rows, axis=0) - rows)[:, None]
    room = WIDTH - tl.sum(tl.sum(less, axis=1), axis=0)
    ahead = before >> 16
    taken = (less == 1) | ((edge == 1) & (ahead < room))
    return taken, (before & 65535) + tl.minimum(ahead, room)


@kernel
@triton.jit(do_not_specialize=["begin", "count", "length", "first", "steps", "total", "room"])
def walk(numbers, tables, news, order, curve, starts, ends, windows, costs, history, begin, count, length, first, steps,
         total, room, MEMORY: tl.constexpr, SHIFTS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
         BLOCK: tl.constexpr, BRANCHES: tl.constexpr, CURVED: tl.constexpr, BOUND: tl.constexpr):
    """Walk around the circle of a segment from place `first` on, and write down who came from whom.

    Parameters
    ----------
    numbers
        float32 (n, length).
    tables, news, curve
        See `Sums`: float32 (period, PIECES, 256), (period, BRANCHES), and, where CURVED, (2**16,).
    order
        int32 (period, BRANCHES): new bits in the order of candidates; -1 where there are no more.
    starts
        int64: the `count` windows that all start with, or, where BOUND, the one that each starts and ends with.
    ends
        int32 (programs,): the place of the best survivor of all.
    windows, costs
        int64 and float32 (programs, 2, BLOCK): survivors, in turns.
    history
        int32 (programs, room): by step and place, (steps, WIDTH), whose place in the lower half and new bits above.
    total
        Bits that enter in all.
    """
    own = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BRANCHES)
    windows += own * (2 * BLOCK)
    costs += own * (2 * BLOCK)
    history += own * room
    x = numbers + (begin + own) * length
    end = tl.load(starts + own) if BOUND else tl.load(starts)
    if BOUND:
        tl.store(windows + i, end + tl.zeros((BLOCK,), tl.int64), i < count)
    else:
        tl.store(windows + i, tl.load(starts + i, i < count, other=0), i < count)
    tl.store(costs + i, tl.zeros((BLOCK,), tl.float32), i < count)
    tl.debug_barrier()
    alive, left = count, total
    one = tl.full((1,), 1, tl.int64)
    for t in range(0, steps):
        place = first + t
        place = tl.where(place >= length, place - length, place)
        phase = place % len(SHIFTS)
        shift = _shift_of(phase, SHIFTS)
        left -= shift
        now = t % 2 * BLOCK
        kept, leads, least, who = _merged(windows + now, costs + now, (one << (MEMORY - shift)) - 1, i, alive, BRANCHES)
        moved = kept << shift
        sums = tl.zeros((BLOCK,), tl.float32)
        for piece in tl.static_range(PIECES):
            sums += tl.load(tables + (phase * PIECES + piece) * 256 + (moved >> 8 * piece & 255))
        new = tl.load(order + phase * BRANCHES + j)
        known = new >= 0
        level = sums[None, :] + tl.load(news + phase * BRANCHES + new, known, other=0.0)[:, None]
        if CURVED:
            level = tl.load(curve + (level.to(tl.int32) & FOLD))
        if BOUND:
            forced = (1 << tl.minimum(shift, tl.maximum(MEMORY - left, 0))) - 1
            known = known & (((new ^ (end >> tl.minimum(left, 63)).to(tl.int32)) & forced) == 0)
        error = tl.load(x + place) - level
        valid = leads[None, :] & known[:, None]
        cost = tl.where(valid, least[None, :] + error * error, float("inf"))
        cost -= tl.min(tl.min(cost, axis=1), axis=0)
        bins = tl.where(valid, cost.to(tl.int32, bitcast=True) >> BIN, NONE)
        taken, goes = _places(bins, _last_bin(bins, WIDTH), WIDTH)
        after = BLOCK - now
        tl.store(windows + after + goes, moved[None, :] | new[:, None].to(tl.int64), taken)
        tl.store(costs + after + goes, cost, taken)
        tl.store(history + t * WIDTH + goes, who[None, :] | (new[:, None] << 16), taken)
        alive = tl.sum(tl.sum(taken.to(tl.int32), axis=1), axis=0)
        tl.debug_barrier()
    cost = tl.load(costs + steps % 2 * BLOCK + i, i < alive, other=float("inf"))
    tl.store(ends + own, tl.min(tl.where(cost == tl.min(cost, axis=0), i, BLOCK), axis=0))


@kernel
@triton.jit(do_not_specialize=["begin", "programs", "length", "first", "steps", "until", "room"])
def follow(history, starts, ends, seams, out, begin, programs, length, first, steps, until, room, MEMORY: tl.constexpr,
           SHIFTS: tl.constexpr, WIDTH: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr):
    """Follow walks back from their ends, many segments a program.

    Where STORE, the bits that entered at every step are written to `out`, uint8 (n, length), from row `begin` on; else
    the windows after `until` steps to `seams`, int64 (programs,). Other arguments as of `walk`.
    """
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = own < programs
    at = tl.load(ends + own, inside, other=0)
    window = tl.zeros((BLOCK,), tl.int64)
    age = 0
    for i in range(0, steps):
        t = steps - 1 - i
        held = tl.load(history + own * room + t * WIDTH + at, inside, other=0)
        new = held >> 16
        at = held & 65535
        if STORE:
            tl.store(out + (begin + own) * length + t, new.to(tl.uint8), inside)
        else:
            place = first + t
            place = tl.where(place >= length, place - length, place)
            seen = (t < until) & (age < MEMORY)
            window |= tl.where(seen, new.to(tl.int64) << tl.minimum(age, 63), 0)
            age += tl.where(t < until, _shift_of(place % len(SHIFTS), SHIFTS), 0)
    if not STORE:
        begun = tl.load(starts + at, inside, other=0) << tl.minimum(age, 63)
        window |= tl.where(age < MEMORY, begun, 0)
        tl.store(seams + own, window & (((1 << MEMORY % 64) - 1) if MEMORY < 64 else -1), inside)
