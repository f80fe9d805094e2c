"""The best path through a trellis of 2**16 states: one program walks one segment, what groups cost in shared memory.

Costs of so many states fit in no multiprocessor's registers. So what is carried from step to step is the least cost of
every group, the states that differ in the bits to go; those of states are made of it a part at a time, and go no
further than to the groups of the next step. There are two rooms for groups, which steps read and write in turns; or one,
which is written when all of it has been read.

A state's bits are (top, other, middle, low): a thread holds all its tops and lows, threads are the middles, parts the
others. Costs bear the number of a branch in their last bits, as in `path`. A walk writes what groups chose, and is
followed back by another kernel, many segments at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.trellis_path.kernels.path import FAR, _lows, _middles, _states_layout, _tops


@gluon.constexpr_function
def _room(memory: int, shifts: tuple[int, ...], turn: int, every: int) -> list[int]:
    """Return the shape of the room that the first, the second or every step reads, and so on in turns of `every`."""
    return [(1 << memory) >> min(shifts[(turn + every * i) % len(shifts)] for i in range(len(shifts)))]


@gluon.constexpr_function
def _seen_layout(top: int, low: int, warps: int, shift: int) -> gl.BlockedLayout:
    """Return how states are held as (top, 1, threads / after, after, low / inside, inside); see `path`."""
    inside = min(low, 1 << shift)
    after = (1 << shift) // inside
    return gl.BlockedLayout([top, 1, 1, 1, low // inside, inside], [1, 1, 32 // after, after, 1, 1],
                            [1, 1, warps, 1, 1, 1], [5, 4, 3, 2, 1, 0])


@gluon.constexpr_function
def _turns(shifts: tuple[int, ...]) -> int:
    """Return the steps after which phases and rooms are as before."""
    return max(2, len(shifts))


@gluon.jit
def _viewed(room, shape: gl.constexpr):
    return room._reinterpret(gl.int32, shape, gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))


@gluon.jit
def _levels(table, TOP: gl.constexpr, OTHER: gl.constexpr, MIDDLE: gl.constexpr, LOW: gl.constexpr,
            LAYOUT: gl.constexpr):
    # what the parts of a state stand for
    zero = gl.load(table)
    others = ()
    for other in gl.static_range(OTHER):
        others = others + (gl.load(table + (other * MIDDLE + _middles(MIDDLE, LAYOUT)) * LOW),)
    tops = gl.load(table + _tops(TOP, LAYOUT) * (OTHER * MIDDLE * LOW)) - zero
    return tops, others, gl.load(table + _lows(LOW, LAYOUT)) - zero


@gluon.jit
def _off(x, levels, table, OTHER: gl.constexpr, other: gl.constexpr, WHOLE: gl.constexpr, LAYOUT: gl.constexpr):
    # how far a number is from what the states of a part stand for: sums of three parts, or read from the table
    TOP: gl.constexpr = levels[0].shape[0]
    MIDDLE: gl.constexpr = levels[1][0].shape[1]
    LOW: gl.constexpr = levels[2].shape[2]
    if WHOLE:
        index = ((_tops(TOP, LAYOUT) * OTHER + other) * MIDDLE + _middles(MIDDLE, LAYOUT)) * LOW + _lows(LOW, LAYOUT)
        off = gl.load(table + index) - x
    else:
        off = (levels[0] + levels[1][other]) + (levels[2] - x)
    return off


@gluon.jit
def _part(seen, off, mask, OTHER: gl.constexpr, other: gl.constexpr, BEFORE: gl.constexpr, SHIFT: gl.constexpr,
          LAYOUT: gl.constexpr):
    # a part of a step: what its groups cost, and what they chose, in the bits of a word that are theirs
    TOP: gl.constexpr = off.shape[0]
    MIDDLE: gl.constexpr = off.shape[1]
    LOW: gl.constexpr = off.shape[2]
    BRANCHES: gl.constexpr = 1 << SHIFT
    REST: gl.constexpr = TOP // BRANCHES
    INSIDE: gl.constexpr = LOW if LOW < (1 << BEFORE) else (1 << BEFORE)
    AFTER: gl.constexpr = (1 << BEFORE) // INSIDE
    SEEN: gl.constexpr = _seen_layout(TOP, LOW, gl.num_warps(), BEFORE)
    got = seen.slice(other, 1, 1).load(gl.SliceLayout(3, gl.SliceLayout(5, SEEN))).to(gl.float32, bitcast=True)
    filled = gl.zeros((TOP, 1, MIDDLE // AFTER, AFTER, LOW // INSIDE, INSIDE), gl.float32, SEEN)
    filled += gl.expand_dims(gl.expand_dims(got, 3), 5)
    cost = gl.convert_layout(gl.reshape(filled, (TOP, MIDDLE, LOW)), LAYOUT, assert_trivial=True)
    cost = gl.fma(off, off, cost)
    key = (cost.to(gl.int32, bitcast=True) & mask) | (_tops(TOP, LAYOUT) // REST)
    best = gl.min(gl.reshape(key, (BRANCHES, REST, MIDDLE, LOW)), axis=0)
    LEFT: gl.constexpr = best.type.layout
    bits = SHIFT * ((_tops(REST, LEFT) * OTHER + other) * LOW + _lows(LOW, LEFT))
    packed = gl.sum(gl.sum((best & (BRANCHES - 1)) << bits, axis=2), axis=0)
    words = gl.convert_layout(packed, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)), assert_trivial=True)
    return gl.reshape(best, (REST, 1, MIDDLE, LOW)), words


@gluon.jit
def _step(source, target, x, levels, table, place, unknown, BEFORE: gl.constexpr, SHIFT: gl.constexpr,
          WHOLE: gl.constexpr, TOGETHER: gl.constexpr, LAYOUT: gl.constexpr):
    # what groups cost before a step to what those cost after it that differ in SHIFT bits; choices to place[: middles].
    # `unknown` as in `path`
    TOP: gl.constexpr = levels[0].shape[0]
    OTHER: gl.constexpr = len(levels[1])
    MIDDLE: gl.constexpr = levels[1][0].shape[1]
    LOW: gl.constexpr = levels[2].shape[2]
    INSIDE: gl.constexpr = LOW if LOW < (1 << BEFORE) else (1 << BEFORE)
    AFTER: gl.constexpr = (1 << BEFORE) // INSIDE
    seen = _viewed(source, [TOP, OTHER, MIDDLE // AFTER, LOW // INSIDE])
    kept = _viewed(target, [TOP >> SHIFT, OTHER, MIDDLE, LOW])
    mask = unknown - (1 << SHIFT)
    words = gl.zeros((MIDDLE,), gl.int32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    bests = ()
    for other in gl.static_range(OTHER):
        off = _off(x, levels, table, OTHER, other, WHOLE, LAYOUT)
        best, chosen = _part(seen, off, mask, OTHER, other, BEFORE, SHIFT, LAYOUT)
        words |= chosen
        if TOGETHER:
            bests = bests + (best,)
        else:
            kept.slice(other, 1, 1).store(best)
    if TOGETHER:
        for other in gl.static_range(OTHER):
            kept.slice(other, 1, 1).store(bests[other])
    gl.store(place + gl.arange(0, MIDDLE, words.type.layout), words)


@gluon.jit
def _begin(room, start, bound, GROUPS: gl.constexpr):
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    index = gl.arange(0, GROUPS, FLAT)
    cost = gl.where((index == start % GROUPS) | (bound == 0), 0.0, FAR)
    room._reinterpret(gl.int32, [GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [0])).store(cost.to(gl.int32, bitcast=True))


@gluon.jit
def _end(room, GROUPS: gl.constexpr, BRANCHES: gl.constexpr):
    # the first of the states that cost least: of the first group, what it chose
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    key = room._reinterpret(gl.int32, [GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(FLAT)
    least = gl.min(key, axis=0)
    group = gl.min(gl.where(key == least, gl.arange(0, GROUPS, FLAT), GROUPS), axis=0)
    return group + (least & (BRANCHES - 1)) * GROUPS


@gluon.jit
def _ahead(x, place, length, TURNS: gl.constexpr):
    numbers = ()
    for p in gl.static_range(TURNS):
        there = place + p
        numbers = numbers + (gl.load(x + gl.where(there >= length, there - length, there)),)
    return numbers


@kernel
@gluon.jit(do_not_specialize=["begin", "each", "length", "first", "count", "room", "bound"])
def forward(numbers, table, choices, seams, begin, each, length, first, count, room, bound, MEMORY: gl.constexpr,
            SHIFTS: gl.constexpr, PARTS: gl.constexpr, WHOLE: gl.constexpr, TOGETHER: gl.constexpr):
    """Walk `count` steps around the circle of a segment from `first` on, both whole turns; a program a segment.

    Parameters
    ----------
    numbers
        float32 (n, length).
    table
        float32 (tables, period, 2**MEMORY); where not WHOLE, sums of what the parts of a state stand for.
    choices
        int32 (programs, room), of which a step takes as many as there are middles; see `back`.
    seams
        int32 (programs,): the states that walks start with where `bound` is not 0; else those that they end in are
        written there.
    begin
        The segment of the first program.
    each
        So many segments after another share a table.
    PARTS
        Bits of a state: (top, other, middle, low).
    TOGETHER
        Whether there is one room only.
    """
    TOP: gl.constexpr = 1 << PARTS[0]
    OTHER: gl.constexpr = 1 << PARTS[1]
    MIDDLE: gl.constexpr = 1 << PARTS[2]
    LOW: gl.constexpr = 1 << PARTS[3]
    STATES: gl.constexpr = 1 << MEMORY
    PERIOD: gl.constexpr = len(SHIFTS)
    TURNS: gl.constexpr = _turns(SHIFTS)
    GROUPS: gl.constexpr = STATES >> SHIFTS[0]
    LAYOUT: gl.constexpr = _states_layout(TOP, MIDDLE, LOW, gl.num_warps())
    own = gl.program_id(0).to(gl.int64)
    x = numbers + (begin + own) * length
    chosen = choices + own * room
    whole = table + (begin + own) // each * (PERIOD * STATES)
    EVERY: gl.constexpr = 1 if TOGETHER else 2
    even = gl.allocate_shared_memory(gl.int32, _room(MEMORY, SHIFTS, 0, EVERY), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rooms = (even, even)
    if not TOGETHER:
        odd = gl.allocate_shared_memory(gl.int32, _room(MEMORY, SHIFTS, 1, 2), gl.SwizzledSharedLayout(1, 1, 1, [0]))
        rooms = (even, odd)
    levels = ()
    for p in gl.static_range(PERIOD):
        levels = levels + (_levels(whole + p * STATES, TOP, OTHER, MIDDLE, LOW, LAYOUT),)
    start = gl.load(seams + own)
    _begin(even, start, bound, GROUPS)
    ahead = _ahead(x, first, length, TURNS)
    for t in range(0, count, TURNS):
        now = ahead
        ahead = _ahead(x, first + t + TURNS, length, TURNS)
        for p in gl.static_range(TURNS):
            _step(rooms[p % 2], rooms[(p + 1) % 2], now[p], levels[p % PERIOD], whole + p % PERIOD * STATES,
                  chosen + (t + p) * MIDDLE, bound >> 1, SHIFTS[p % PERIOD], SHIFTS[(p + 1) % PERIOD], WHOLE, TOGETHER,
                  LAYOUT)
    end = _end(even, GROUPS, 1 << SHIFTS[0])
    gl.store(seams + own, gl.where(bound == 0, end, start))
