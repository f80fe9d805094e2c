"""The best path through a bit-shift trellis: one program walks one segment, its costs in registers.

A state's bits are (top, middle, low): a thread holds all its tops and lows, threads are the middles. The branches of a
group differ in the top bits, so a thread compares them alone; what it found goes through shared memory to those who
hold the states after, one word for all the states of a group. What groups chose is packed into a word a thread and
step, and followed back at the end. A first walk over the seam finds the state at it, which the second walk starts and
ends with: the tail bites.

Costs are sums of squares, so positive, and order as their bits do: the number of a branch takes the place of the last
bits, and one minimum finds the least and where it came from.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel

FAR = gl.constexpr(1e30)  # the cost of a state that a walk may not start with


@gluon.constexpr_function
def _states_layout(top: int, threads: int, low: int, warps: int) -> gl.BlockedLayout:
    """Return how threads hold states (top, threads, low): tops in lanes only where there are too few states."""
    lanes = 32 * warps // threads
    return gl.BlockedLayout([top // lanes, 1, low], [lanes, 32 // lanes, 1], [1, warps, 1], [2, 1, 0])


@gluon.constexpr_function
def _rooms(top: int, middle: int, low: int, shifts: tuple[int, ...]) -> list[int]:
    """Return the shape of what groups hand on: in turns, so that none is written while it is read."""
    return [2, top * middle * low >> min(shifts)]


@gluon.constexpr_function
def _groups_layout(top: int, threads: int, low: int, warps: int, shift: int) -> gl.BlockedLayout:
    """Return the same of (top, threads / after, after, low / inside, inside): after * inside states share a group."""
    lanes = 32 * warps // threads
    inside = min(low, 1 << shift)
    after = (1 << shift) // inside
    return gl.BlockedLayout([top // lanes, 1, 1, low // inside, inside], [lanes, 32 // lanes // after, after, 1, 1],
                            [1, warps, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.jit
def _tops(count: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.arange(0, count, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]


@gluon.jit
def _middles(count: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.arange(0, count, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]


@gluon.jit
def _lows(count: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.arange(0, count, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@gluon.jit
def _off(x, high, low, table, WHOLE: gl.constexpr, LAYOUT: gl.constexpr):
    # how far a number is from what states stand for: sums of two parts, or read at every step, from the first cache
    if WHOLE:
        TOP: gl.constexpr = high.shape[0]
        MIDDLE: gl.constexpr = high.shape[1]
        LOW: gl.constexpr = low.shape[2]
        index = (_tops(TOP, LAYOUT) * MIDDLE + _middles(MIDDLE, LAYOUT)) * LOW + _lows(LOW, LAYOUT)
        off = gl.load(table + index) - x
    else:
        off = high + (low - x)
    return off


@gluon.jit
def _step(metric, x, high, low, table, place, spare, unknown, SHIFT: gl.constexpr, WHOLE: gl.constexpr, LAYOUT: gl.constexpr):
    # costs before to those after; what groups chose goes to place[: middles]. `unknown` is 0, which the compiler must not
    # know: an instruction masks a cost and puts a branch's number there, if one of both is in a register
    TOP: gl.constexpr = metric.shape[0]
    MIDDLE: gl.constexpr = metric.shape[1]
    LOW: gl.constexpr = metric.shape[2]
    BRANCHES: gl.constexpr = 1 << SHIFT
    REST: gl.constexpr = TOP // BRANCHES
    INSIDE: gl.constexpr = LOW if LOW < BRANCHES else BRANCHES
    AFTER: gl.constexpr = BRANCHES // INSIDE
    key = (metric.to(gl.int32, bitcast=True) & (unknown - BRANCHES)) | (_tops(TOP, LAYOUT) // REST)
    best = gl.min(gl.reshape(key, (BRANCHES, REST, MIDDLE, LOW)), axis=0)
    LEFT: gl.constexpr = best.type.layout
    bits = SHIFT * (_tops(REST, LEFT) * LOW + _lows(LOW, LEFT))
    packed = gl.sum(gl.sum((best & (BRANCHES - 1)) << bits, axis=2), axis=0)
    gl.store(place + gl.arange(0, MIDDLE, packed.type.layout), packed)
    spare._reinterpret(gl.int32, [REST, MIDDLE, LOW], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])).store(best)
    GROUPS: gl.constexpr = _groups_layout(TOP, MIDDLE, LOW, gl.num_warps(), SHIFT)
    seen = spare._reinterpret(gl.int32, [TOP, MIDDLE // AFTER, LOW // INSIDE],
                              gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    got = seen.load(gl.SliceLayout(2, gl.SliceLayout(4, GROUPS))).to(gl.float32, bitcast=True)
    spread = gl.expand_dims(gl.expand_dims(got, 2), 4)
    filled = gl.zeros((TOP, MIDDLE // AFTER, AFTER, LOW // INSIDE, INSIDE), gl.float32, GROUPS) + spread
    after = gl.convert_layout(gl.reshape(filled, (TOP, MIDDLE, LOW)), LAYOUT, assert_trivial=True)
    off = _off(x, high, low, table, WHOLE, LAYOUT)
    return gl.fma(off, off, after)


@gluon.jit
def _before(state, place, bits, SHIFT: gl.constexpr, MIDDLE: gl.constexpr, LOW: gl.constexpr):
    # the state before a step, from the state after it and what its group chose; states are of `bits` bits
    group = state >> SHIFT
    word = gl.load(place + group // LOW % MIDDLE)
    own = group // (MIDDLE * LOW) * LOW + group % LOW
    return group + ((word >> (SHIFT * own) & ((1 << SHIFT) - 1)) << (bits - SHIFT))


@gluon.jit
def _forward(metric, x, chosen, first, count, length, high, low, table, spare, unknown, SHIFTS: gl.constexpr,
             WHOLE: gl.constexpr, LAYOUT: gl.constexpr):
    # costs after `count` steps around the circle from `first`
    PERIOD: gl.constexpr = len(SHIFTS)
    MIDDLE: gl.constexpr = metric.shape[1]
    STATES: gl.constexpr = metric.numel
    ahead = ()
    for p in gl.static_range(PERIOD):
        ahead = ahead + (gl.load(x + first + p),)
    for t in range(0, count, PERIOD):
        numbers = ahead
        following = first + t + PERIOD
        following = gl.where(following >= length, following - length, following)
        ahead = ()
        for p in gl.static_range(PERIOD):
            ahead = ahead + (gl.load(x + following + p),)
        for p in gl.static_range(PERIOD):
            metric = _step(metric, numbers[p], high[p], low[p], table + p * STATES, chosen + (t + p) * MIDDLE,
                           spare.index((t + p) % 2), unknown, SHIFTS[p], WHOLE, LAYOUT)
    return metric


@gluon.jit
def _backward(state, chosen, out, count, end, bits, SHIFTS: gl.constexpr, MIDDLE: gl.constexpr, LOW: gl.constexpr,
              STORE: gl.constexpr):
    # from the state after `count` steps to that after `end`
    PERIOD: gl.constexpr = len(SHIFTS)
    for i in range(0, count - end, PERIOD):
        for q in gl.static_range(PERIOD):
            t = count - 1 - q - i
            if STORE:
                gl.store(out + t, state)
            state = _before(state, chosen + t * MIDDLE, bits, SHIFTS[PERIOD - 1 - q], MIDDLE, LOW)
    return state


@gluon.jit
def _least(metric, LAYOUT: gl.constexpr):
    # the first of the states that cost least
    TOP: gl.constexpr = metric.shape[0]
    MIDDLE: gl.constexpr = metric.shape[1]
    LOW: gl.constexpr = metric.shape[2]
    least = gl.min(gl.min(gl.min(metric, axis=2), axis=1), axis=0)
    index = (_tops(TOP, LAYOUT) * MIDDLE + _middles(MIDDLE, LAYOUT)) * LOW + _lows(LOW, LAYOUT)
    index = gl.where(metric == least, index, TOP * MIDDLE * LOW)
    return gl.min(gl.min(gl.min(index, axis=2), axis=1), axis=0)


@kernel
@gluon.jit(do_not_specialize=["begin", "each", "length", "warm", "room"])
def path(numbers, table, choices, states, begin, each, length, warm, room, MEMORY: gl.constexpr,
         SHIFTS: gl.constexpr, PARTS: gl.constexpr, WHOLE: gl.constexpr):
    """Write the states after every step, int32 (n, length), of segments (n, length); a program a segment.

    Parameters
    ----------
    numbers
        float32 (n, length).
    table
        float32 (tables, period, 2**MEMORY); where not WHOLE, sums of what a state's low bits and the others stand for.
    choices
        int32 (programs, room).
    each
        So many segments after another share a table.
    warm
        Steps on either side of the seam.
    room
        `max(length, 2 warm)` times middle.
    PARTS
        Bits of a state: (top, middle, low).
    """
    TOP: gl.constexpr = 1 << PARTS[0]
    MIDDLE: gl.constexpr = 1 << PARTS[1]
    LOW: gl.constexpr = 1 << PARTS[2]
    PERIOD: gl.constexpr = len(SHIFTS)
    LAYOUT: gl.constexpr = _states_layout(TOP, MIDDLE, LOW, gl.num_warps())
    own = gl.program_id(0).to(gl.int64)
    x = numbers + (begin + own) * length
    out = states + (begin + own) * length
    chosen = choices + own * room
    which = (begin + own) // each
    spare = gl.allocate_shared_memory(gl.int32, _rooms(TOP, MIDDLE, LOW, SHIFTS),
                                      gl.SwizzledSharedLayout(1, 1, 1, [0]))
    whole = table + which * (PERIOD * TOP * MIDDLE * LOW)
    highs, lows = (), ()
    for p in gl.static_range(PERIOD):
        level = whole + p * (TOP * MIDDLE * LOW)
        highs = highs + (gl.load(level + (_tops(TOP, LAYOUT) * MIDDLE + _middles(MIDDLE, LAYOUT)) * LOW),)
        lows = lows + (gl.load(level + _lows(LOW, LAYOUT)) - gl.load(level),)
    metric = gl.zeros((TOP, MIDDLE, LOW), gl.float32, LAYOUT)
    unknown = warm >> 30
    metric = _forward(metric, x, chosen, length - warm, 2 * warm, length, highs, lows, whole, spare, unknown, SHIFTS,
                      WHOLE, LAYOUT)
    seam = _least(metric, LAYOUT)
    gl.thread_barrier()
    seam = _backward(seam, chosen, out, 2 * warm, warm, MEMORY, SHIFTS, MIDDLE, LOW, False)
    gl.thread_barrier()
    index = (_tops(TOP, LAYOUT) * MIDDLE + _middles(MIDDLE, LAYOUT)) * LOW + _lows(LOW, LAYOUT)
    metric = gl.where(index == seam, 0.0, FAR)
    metric = _forward(metric, x, chosen, 0, length, length, highs, lows, whole, spare, unknown, SHIFTS, WHOLE, LAYOUT)
    gl.thread_barrier()
    _backward(seam, chosen, out, length, 0, MEMORY, SHIFTS, MIDDLE, LOW, True)
