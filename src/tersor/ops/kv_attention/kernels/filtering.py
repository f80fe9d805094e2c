"""Queries through a filter to bit planes, and sums of signs through it back, a warp's query at a time.

Number i is a sum over RATE signs of its own and of each of the REACH - 1 numbers before it, around a circle: sign b of number
i - k counts `taps[i mod PERIOD, k, b]`. SHAPE is that of the taps, (PERIOD, REACH, RATE).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels.arriving import registers
from tersor.ops.kv_attention.kernels.turning import coordinates, keep, largest_of, note, take, take_float

PLANES = gl.constexpr(10)  # of a query's integers, the largest of which is that of its largest coordinate
MOST = gl.constexpr(float((1 << 9) - 1))
BYTE = gl.constexpr("st.shared.b8 [$1], $2;\nmov.b32 $0, 0;")


@gluon.constexpr_function
def at_once(rate: int) -> int:
    """Return the numbers that a lane has together, so that their signs fill bytes."""
    return 8 if rate % 2 else 4


@gluon.constexpr_function
def steps_of(signs: int) -> int:
    """Return the words of each plane that a lane has, of so many signs."""
    return (signs + 127) // 128


@gluon.jit
def load_taps(taps, lane, SHAPE: gl.constexpr):
    """Return taps in each lane's own registers."""
    found = ()
    for place in gl.static_range(SHAPE[0] * SHAPE[1] * SHAPE[2]):
        found = found + (gl.load(taps + (lane * 0 + place)),)
    return found


@gluon.jit
def rotate(query, signs, offset, at, row, lane, ROWS: gl.constexpr, DIM: gl.constexpr, TURNED: gl.constexpr,
           SHIFTED: gl.constexpr):
    """Write a warp's query as coordinates to shared memory; return its product with `offset`."""
    EACH: gl.constexpr = DIM // 32
    numbers, shift = coordinates(query, signs, offset, row, lane, ROWS, DIM, TURNED, SHIFTED)
    words = ()
    for place in gl.static_range(EACH):
        words = words + (numbers[place].to(gl.int32, bitcast=True),)
    keep(at + lane * (EACH * 4), words)
    return shift


@gluon.jit
def signs_of(taps, at, first, DIM: gl.constexpr, SHAPE: gl.constexpr):
    """Return what the signs of a lane's numbers from `first` on meet: sums over the numbers that each is part of."""
    REACH: gl.constexpr = SHAPE[1]
    RATE: gl.constexpr = SHAPE[2]
    SOME: gl.constexpr = at_once(RATE)
    numbers = ()
    for place in gl.static_range(SOME + REACH - 1):
        numbers = numbers + (take_float(at + ((first + place) & (DIM - 1)) * 4),)
    found = ()
    for own in gl.static_range(SOME):
        for bit in gl.static_range(RATE):
            whole = numbers[own] * taps[own % SHAPE[0] * (REACH * RATE) + bit]
            for far in gl.static_range(1, REACH):
                whole += numbers[own + far] * taps[((own + far) % SHAPE[0] * REACH + far) * RATE + bit]
            found = found + (whole,)
    return found


@gluon.jit
def planes_of(integers, SHIFT: gl.constexpr):
    """Return bits SHIFT … SHIFT + 7 of eight integers, four planes a word: byte p has bit p of all, the first one's lowest.

    Blocks of two, of four and of eight bits change places with those across the diagonal.
    """
    halves = ()
    for half in gl.static_range(2):
        word = (integers[4 * half] >> SHIFT) & 255
        for place in gl.static_range(1, 4):
            word |= ((integers[4 * half + place] >> SHIFT) & 255) << (8 * place)
        swap = (word ^ (word >> 7)) & 0x00AA00AA
        word ^= swap ^ (swap << 7)
        swap = (word ^ (word >> 14)) & 0x0000CCCC
        halves = halves + (word ^ swap ^ (swap << 14),)
    low, high = halves
    return (low & 0x0F0F0F0F) | ((high & 0x0F0F0F0F) << 4), ((low >> 4) & 0x0F0F0F0F) | (high & -0x0F0F0F10)


@gluon.jit
def ask_planes(taps, at, scaling, shift, start, warp, lane, turn: gl.constexpr, DIM: gl.constexpr, SHAPE: gl.constexpr,
               SETS: gl.constexpr):
    """Write the planes of a warp's query, whose coordinates are `at`, and what its sums begin with and count.

    Words of planes lie set by set (tile, step, lane), as `ask_signs` writes them; three words a query come after them.
    """
    RATE: gl.constexpr = SHAPE[2]
    SOME: gl.constexpr = at_once(RATE)
    STEPS: gl.constexpr = steps_of(DIM * RATE)
    TILES: gl.constexpr = PLANES // 2
    own = lane & (DIM // SOME - 1)  # lanes beyond write what others do
    signs = signs_of(taps, at, own * SOME, DIM, SHAPE)
    largest = largest_of(signs)
    inverse = MOST / gl.where(largest == 0.0, 1.0, largest)
    begin = gl.zeros_like(lane)
    first = start + (turn * TILES * STEPS * 32 + warp * 8) * 4
    for octet in gl.static_range(SOME * RATE // 8):
        integers = ()
        for place in gl.static_range(8):
            integer = gl.floor(signs[8 * octet + place] * inverse + 0.5).to(gl.int32)
            begin -= integer
            integers = integers + (integer,)
        byte = own * (SOME * RATE // 8) + octet
        word = byte >> 2
        near = first + (word % STEPS * 128 + word // STEPS * 4 + (byte & 3))
        four = planes_of(integers, 0) + planes_of(integers, 8)
        for plane in gl.static_range(PLANES):
            gl.inline_asm_elementwise(BYTE, registers(1, 2), [near + (plane // 2 * STEPS * 128 + plane % 2 * 16),
                                                              four[plane // 4] >> (8 * (plane % 4))],
                                      dtype=gl.int32, is_pure=False, pack=1)
    for word in gl.static_range(DIM * RATE // 32, 4 * STEPS):  # beyond the last
        for plane in gl.static_range(PLANES):
            keep(first + ((plane // 2 * STEPS + word % STEPS) * 128 + plane % 2 * 16 + word // STEPS * 4) + lane * 0,
                 (gl.zeros_like(lane),))
    note(start + (SETS * TILES * STEPS * 128 + (turn * 4 + warp) * 12), gl.where(lane < DIM // SOME, begin, 0),
         largest / MOST * scaling, shift * scaling)


@gluon.jit
def filtered(sums, taps, at, lane, DIM: gl.constexpr, SHAPE: gl.constexpr):
    """Return coordinates from a warp's sums of signs, neighbours a lane; shared memory from `at` on has room for these."""
    EACH: gl.constexpr = DIM // 32
    PERIOD: gl.constexpr = SHAPE[0]
    REACH: gl.constexpr = SHAPE[1]
    RATE: gl.constexpr = SHAPE[2]
    words = ()
    for place in gl.static_range(EACH * RATE):
        words = words + (sums[place].to(gl.int32, bitcast=True),)
    keep(at + lane * (EACH * RATE * 4), words)
    gl.thread_barrier()
    near = ()
    for place in gl.static_range(EACH + REACH - 1):
        number = (lane * EACH + (place - REACH + 1)) & (DIM - 1)
        near = near + take(at + number * (RATE * 4), RATE)
    found = ()
    for own in gl.static_range(EACH):
        whole = gl.zeros_like(sums[0])
        for far in gl.static_range(REACH):
            for bit in gl.static_range(RATE):
                tap = taps[(own % PERIOD * REACH + far) * RATE + bit]
                if EACH % PERIOD:  # lanes begin within a period
                    for turn in gl.static_range(1, PERIOD // EACH):
                        tap = gl.where(lane % (PERIOD // EACH) == turn,
                                       taps[((own + turn * EACH) * REACH + far) * RATE + bit], tap)
                whole += near[(own + REACH - 1 - far) * RATE + bit].to(gl.float32, bitcast=True) * tap
        found = found + (whole,)
    return found
