"""Queries as integers in bit planes, as signs of keys meet them: see bits.py for which column of a product has which."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels import bits

PLANES = gl.constexpr(bits.ASKED)
TILES = gl.constexpr(bits.ASKED_TILES)
WORD = gl.constexpr(32)
BALLOT = gl.constexpr(bits.ballot())
WHOLE = gl.constexpr("redux.sync.add.s32 $0, $1, -1;")
registers = gluon.constexpr_function(bits.registers)


@gluon.jit
def ballot(integers, PLANE: gl.constexpr):
    """Return the bits of a plane of a row's 32 integers, a warp's, as a word."""
    return gl.inline_asm_elementwise(BALLOT, registers(1, 1), [(integers >> PLANE) & 1], dtype=gl.int32, is_pure=False,
                                     pack=1)


@kernel
@gluon.jit
def ask_signs(query, lines, bounds, offset, planes, begins, units, shifts, scaling, HEADS: gl.constexpr,
              ROWS: gl.constexpr, DIM: gl.constexpr, SIGNS: gl.constexpr, STEPS: gl.constexpr, PER_HEAD: gl.constexpr,
              SHIFTED: gl.constexpr, SETS: gl.constexpr, ALL: gl.constexpr):
    """Write a word of each plane of a head's queries, (part, set, tile, step, lane), and what its sums begin with.

    A warp has a query, a lane one of 32 signs; `lines` are (heads or 1, DIM, SIGNS). Coordinates are divided by a bound
    of theirs, of which the largest integer, 2**(PLANES - 1) - 1, is one: 2-norms of the query and, in `bounds`, of the
    longest line. Words beyond the last are zeros. `begins` is (part, word, row). Programs of the third axis have other
    queries, SETS times four of ALL times four.
    """
    R: gl.constexpr = 4 * SETS
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False,
                              pack=1)
    part = gl.program_id(0)
    word = gl.program_id(1)
    head = part % HEADS
    lane = gl.arange(0, WORD, layout=gl.SliceLayout(0, layout))[None, :]
    above = 0
    if ALL > SETS:
        above = gl.program_id(2) * R
    row = gl.arange(0, R, layout=gl.SliceLayout(1, layout))[:, None] + lane * 0
    column = word * WORD + lane + row * 0
    side = lines + ((head * DIM * SIGNS if PER_HEAD else 0) + column)
    near = query + (part * ROWS + above) * DIM + row * DIM
    inside = row < ROWS - above
    number = gl.zeros([R, WORD], gl.float32, layout)
    power = gl.zeros([R, WORD], gl.float32, layout)
    shift = gl.zeros([R, WORD], gl.float32, layout)
    AT_ONCE: gl.constexpr = DIM // SETS  # numbers that are asked for together; all of two sets are too many
    for start in range(0, DIM, AT_ONCE):
        for each in gl.static_range(AT_ONCE):
            place = start + each
            q = gl.load(near + place, inside, other=0.0).to(gl.float32)
            number += q * gl.load(side + place * SIGNS, column < SIGNS, other=0.0)
            power += q * q
            if SHIFTED:
                shift += q * gl.load(offset + ((head * DIM if PER_HEAD else 0) + place))
    bound = gl.sqrt(power) * gl.load(bounds + (head if PER_HEAD else 0))
    step = bound / ((1 << (PLANES - 1)) - 1)
    inverse = gl.where(bound > 0.0, 1.0 / gl.where(bound > 0.0, step, 1.0), 0.0)
    integers = gl.floor(number * inverse + 0.5).to(gl.int32)
    whole = gl.inline_asm_elementwise(WHOLE, registers(1, 1), [integers], dtype=gl.int32, is_pure=False, pack=1)
    first = column % WORD == 0
    gl.store(begins + ((part * (4 * STEPS) + word) * (4 * ALL) + above + row), -whole, first)
    gl.store(units + (part * (4 * ALL) + above + row), step * scaling, first & (column == 0))
    gl.store(shifts + (part * (4 * ALL) + above + row), shift * scaling, first & (column == 0))
    at = planes + ((part * ALL + above // 4 + row // 4) * (TILES * STEPS * WORD) + word % STEPS * WORD + word // STEPS)
    for plane in gl.static_range(PLANES):
        gl.store(at + (plane // 2 * STEPS * WORD + 4 * (row % 4 * 2 + plane % 2)), ballot(integers, plane), first)
