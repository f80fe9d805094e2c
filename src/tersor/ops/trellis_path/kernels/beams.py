"""Beams on CUDA: a program walks one segment; see `beam.reference` for what a step means.

Survivors are in the order of their bits, newest first, and stay so: windows that agree in what stays are neighbours, at
most as many as bits that leave can tell apart. So nothing is sorted or hashed. The last bin to take is found two bits of
its number at a time; where a candidate goes follows from how many are taken before it.

Products and sums are rounded one by one, as on the processor, so paths are the reference's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel

BIN = gl.constexpr(18)  # bits of a cost that do not tell bins apart
FOLD = gl.constexpr(65535)
FAR = gl.constexpr(1e30)  # what is no candidate costs
NONE = gl.constexpr(8191)  # its bin: above that of infinity
ROUNDS = gl.constexpr(7)  # of two bits of a bin
FIELD = gl.constexpr(20)  # bits of a count


@gluon.constexpr_function
def _layout(branches: int, block: int, warps: int) -> gl.BlockedLayout:
    """Return how candidates (branches, block) are held: a thread has all those of some survivors."""
    return gl.BlockedLayout([branches, max(1, block // (32 * warps))], [1, 32], [1, warps], [1, 0])


@triton.jit
def _shift_of(phase, SHIFTS: tl.constexpr):
    shift = SHIFTS[0] + 0 * phase
    for p in tl.static_range(1, len(SHIFTS)):
        shift = tl.where(phase == p, SHIFTS[p], shift)
    return shift


@gluon.jit
def _phase_shift(phase, SHIFTS: gl.constexpr):
    shift = SHIFTS[0] + 0 * phase
    for p in gl.static_range(1, len(SHIFTS)):
        shift = gl.where(phase == p, SHIFTS[p], shift)
    return shift


@gluon.jit
def _sum_of(left, right):
    return left + right


@gluon.jit
def _merged(windows, costs, keep, i, alive, BRANCHES: gl.constexpr):
    # survivors' kept bits, which are the first of their group, its least cost, and whose that is
    kept = gl.load(windows + i, i < alive, other=0) & keep
    least = gl.load(costs + i, i < alive, other=0.0)
    before = gl.load(windows + (i - 1), (i > 0) & (i < alive), other=0) & keep
    leads = (i < alive) & ((i == 0) | (before != kept))
    who = i
    for d in gl.static_range(1, BRANCHES):
        there = i + d < alive
        cost = gl.load(costs + (i + d), there, other=0.0)
        less = there & ((gl.load(windows + (i + d), there, other=0) & keep) == kept) & (cost < least)
        least = gl.where(less, cost, least)
        who = gl.where(less, i + d, who)
    return kept, leads, least, who


@gluon.jit
def _below(bins, bound):
    # how many candidates of every survivor are in lower bins
    return gl.sum((bins < bound).to(gl.int32), axis=0).to(gl.int64)


@gluon.jit
def _last_bin(bins, WIDTH: gl.constexpr):
    # the highest bin that fewer than WIDTH candidates are below
    found = 0
    for turn in gl.static_range(ROUNDS):
        step = 1 << 2 * (ROUNDS - 1 - turn)
        below = _below(bins, found + step) + (_below(bins, found + 2 * step) << FIELD)
        counts = gl.sum(below + (_below(bins, found + 3 * step) << 2 * FIELD), axis=0)
        for place in gl.static_range(3):
            found += gl.where((counts >> place * FIELD & ((1 << FIELD) - 1)) < WIDTH, step, 0)
    return gl.minimum(found, NONE)


@gluon.jit
def _places(bins, last, WIDTH: gl.constexpr):
    # which candidates are taken, and where each goes: those of the last bin in their order, as many as there is room for
    less = (bins < last).to(gl.int32)
    edge = ((bins == last) & (bins != NONE)).to(gl.int32)
    both = less + (edge << 16)
    rows = gl.sum(both, axis=1)
    HELD: gl.constexpr = rows.type.layout
    j = gl.arange(0, both.shape[0], HELD)
    ahead = gl.zeros((both.shape[0],), gl.int32, HELD)
    for branch in gl.static_range(both.shape[0] - 1):  # a thread holds all branches
        ahead += gl.where(j > branch, gl.sum(gl.where(j == branch, rows, 0), axis=0), 0)
    before = gl.associative_scan(both, 1, _sum_of) - both + gl.expand_dims(ahead, 1)
    room = WIDTH - (gl.sum(rows, axis=0) & 65535)
    edges = before >> 16
    taken = (less == 1) | ((edge == 1) & (edges < room))
    return taken, (before & 65535) + gl.minimum(edges, room)


@gluon.jit
def _levels(moved, tables, news, curve, new, known, PIECES: gl.constexpr, CURVED: gl.constexpr):
    # the numbers of windows (new bits, survivors)
    HELD: gl.constexpr = moved.type.layout
    sums = gl.zeros(moved.shape, gl.float32, HELD)
    for piece in gl.static_range(PIECES):
        sums += gl.load(tables + 256 * piece + (moved >> 8 * piece & 255))
    level = gl.expand_dims(sums, 0) + gl.expand_dims(gl.load(news + new, known, other=0.0), 1)
    if CURVED:
        level = gl.load(curve + (level.to(gl.int32) & FOLD))
    return level


@gluon.jit
def _step(x, source, target, code, alive, forced, history, MEMORY: gl.constexpr, PIECES: gl.constexpr,
          WIDTH: gl.constexpr, BLOCK: gl.constexpr, BRANCHES: gl.constexpr, CURVED: gl.constexpr):
    # from survivors, (windows, costs), to the next ones; returns how many those are
    BOTH: gl.constexpr = _layout(BRANCHES, BLOCK, gl.num_warps())
    i = gl.arange(0, BLOCK, gl.SliceLayout(0, BOTH))
    j = gl.arange(0, BRANCHES, gl.SliceLayout(1, BOTH))
    shift, tables, news, order, curve = code
    keep = (gl.full((BLOCK,), 1, gl.int64, gl.SliceLayout(0, BOTH)) << (MEMORY - shift)) - 1
    kept, leads, least, who = _merged(source[0], source[1], keep, i, alive, BRANCHES)
    moved = kept << shift
    new = gl.load(order + j)
    level = _levels(moved, tables, news, curve, new, new >= 0, PIECES, CURVED)
    known = (new >= 0) & (((new ^ forced[0]) & forced[1]) == 0)
    valid = gl.expand_dims(leads, 0) & gl.expand_dims(known, 1)
    error = x - level
    cost = gl.where(valid, gl.expand_dims(least, 0) + error * error, FAR)
    cost -= gl.min(gl.min(cost, axis=0), axis=0)
    bins = gl.where(valid, cost.to(gl.int32, bitcast=True) >> BIN, NONE)
    taken, goes = _places(bins, _last_bin(bins, WIDTH), WIDTH)
    gl.store(target[0] + goes, gl.expand_dims(moved, 0) | gl.expand_dims(new.to(gl.int64), 1), taken)
    gl.store(target[1] + goes, cost, taken)
    gl.store(history + goes, gl.expand_dims(who, 0) | gl.expand_dims(new << 16, 1), taken)
    return gl.sum(gl.sum(taken.to(gl.int32), axis=0), axis=0)


@gluon.jit
def _begin(windows, costs, starts, count, BLOCK: gl.constexpr, BRANCHES: gl.constexpr):
    HELD: gl.constexpr = gl.SliceLayout(0, _layout(BRANCHES, BLOCK, gl.num_warps()))
    i = gl.arange(0, BLOCK, HELD)
    inside = i < count
    gl.store(windows + i, gl.load(starts + i, inside, other=0), inside)
    gl.store(costs + i, gl.zeros((BLOCK,), gl.float32, HELD), inside)


@kernel
@gluon.jit(do_not_specialize=["begin", "count", "length", "first", "steps", "total", "room", "bound"])
def walk(numbers, tables, news, order, curve, starts, ends, windows, costs, history, begin, count, length, first, steps,
         total, room, bound, MEMORY: gl.constexpr, SHIFTS: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr,
         BLOCK: gl.constexpr, BRANCHES: gl.constexpr, CURVED: gl.constexpr):
    """Walk around the circle of a segment from place `first` on, and write down who came from whom.

    Parameters
    ----------
    numbers
        float32 (n, length).
    tables, news, order, curve
        See `Sums`: float32 (period, PIECES, 256), (period, BRANCHES), int32 as many; where CURVED, float32 (2**16,).
    starts
        int64: the `count` windows that all start with, or, where `bound` is not 0, the one that each starts and ends
        with.
    ends
        int32 (programs,): the place of the best survivor of all.
    windows, costs
        int64 and float32 (programs, 2, BLOCK): survivors, in turns.
    history
        int32 (programs, room): by step and place, (steps, WIDTH), whose place in the lower half and new bits above.
    total
        Bits that enter in all.
    """
    own = gl.program_id(0).to(gl.int64)
    windows += own * (2 * BLOCK)
    costs += own * (2 * BLOCK)
    history += own * room
    x = numbers + (begin + own) * length
    starts += gl.where(bound == 0, 0, own)
    end = gl.load(starts)
    _begin(windows, costs, starts, count, BLOCK, BRANCHES)
    alive, left = count, total
    for t in range(0, steps):
        gl.thread_barrier()
        place = first + t
        place = gl.where(place >= length, place - length, place)
        phase = place % len(SHIFTS)
        shift = _phase_shift(phase, SHIFTS)
        left -= shift
        bits = gl.where(bound == 0, 0, gl.minimum(shift, gl.maximum(MEMORY - left, 0)))
        forced = ((end >> gl.minimum(left, 63)).to(gl.int32), (1 << bits) - 1)
        now = t % 2 * BLOCK
        then = BLOCK - now
        code = (shift, tables + phase * (PIECES * 256), news + phase * BRANCHES, order + phase * BRANCHES, curve)
        alive = _step(gl.load(x + place), (windows + now, costs + now), (windows + then, costs + then), code, alive,
                      forced, history + t * WIDTH, MEMORY, PIECES, WIDTH, BLOCK, BRANCHES, CURVED)
    gl.thread_barrier()
    i = gl.arange(0, BLOCK, gl.SliceLayout(0, _layout(BRANCHES, BLOCK, gl.num_warps())))
    cost = gl.load(costs + steps % 2 * BLOCK + i, i < alive, other=FAR)
    gl.store(ends + own, gl.min(gl.where(cost == gl.min(cost, axis=0), i, BLOCK), axis=0))


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
