"""Few vectors times streams across lines: a warp takes 64 numbers of 256 columns at a time; see `ptx.across`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.window_linear.kernels.shared import (
    COLUMNS,
    GROUPS,
    ROW_BYTES,
    RUN,
    TILE,
    agree,
    arrived,
    begun,
    fetch,
    filled,
    shared_sums,
    wait,
)
from tersor.ops.window_linear.shapes import tables


@gluon.constexpr_function
def _registers(sums: int, words: int) -> str:
    return ",".join(["=&f"] * sums + ["f"] * sums + ["r"] * (words + 1) + ["l"])


@gluon.constexpr_function
def _floats(count: int) -> tuple:
    return (gl.float32,) * count


@gluon.constexpr_function
def _spread_registers(words: int) -> str:
    return ",".join(["=r"] + ["r"] * (words + 1) + ["l", "r"] + ["f"] * tables.RUN)


@gluon.constexpr_function
def _integers(count: int) -> tuple:
    return (gl.int32,) * count


@gluon.constexpr_function
def _stream_registers(count: int) -> str:
    return ",".join(["=&r"] * count + ["r", "r"])


@gluon.jit
def _ask(stage, lane, codes, step, item, steps, warp, pitch, PARTS: gl.constexpr, SEGMENT: gl.constexpr,
         BITS: gl.constexpr, BEFORE: gl.constexpr, S: gl.constexpr):
    # start to copy what a warp takes in a step of an item
    column = ((item % PARTS * steps + step) * S + warp) * ROW_BYTES
    first = item // PARTS * (GROUPS * BITS)
    wraps = gl.where(first % SEGMENT == 0, SEGMENT, 0)
    fetch(stage, lane, codes, column, first, wraps, pitch, BITS, BEFORE)


@gluon.jit
def _place(thread, item, tile, turn, PARTS: gl.constexpr, S: gl.constexpr):
    # the row and the vector of a sum of `shared_sums`, and which number of a lane it is
    found = thread + turn * (32 * S)
    number, lane = found // 32, found % 32
    row = item // PARTS * TILE + lane // 4 * RUN + number // 4 * 2 + number % 4 // 2
    return row, 8 * tile + 2 * (lane % 4) + number % 2, number


@gluon.jit
def _write(sums, scale, peak, out, room, group, thread, item, items, rows, batch, PARTS: gl.constexpr,
           TILES: gl.constexpr, S: gl.constexpr):
    # the products of an item, summed over warps
    COUNT: gl.constexpr = RUN // 2 * 4
    TURNS: gl.constexpr = (COUNT + S - 1) // S
    own_item = gl.minimum(item, items - 1)
    for tile in gl.static_range(TILES):
        own = ()
        for pair in gl.static_range(RUN // 2):
            own = own + sums[4 * (pair * TILES + tile) : 4 * (pair * TILES + tile) + 4]
        totals = shared_sums(own, room, group, thread, S)
        for turn in gl.static_range(TURNS):
            row, column, number = _place(thread, own_item, tile, turn, PARTS, S)
            line = (own_item % PARTS * batch + column).to(gl.int64) * rows
            y = totals[turn] * peak[tile * TURNS + turn] * scale[turn]
            gl.store(out + line + row, y.to(out.dtype.element_ty), (column < batch) & (number < COUNT) & (item < items))


@kernel
@gluon.jit(do_not_specialize=["items", "steps"])
def multiply_tiles(codes, image, xp, peaks, scales, out, rows, batch, pitch, items, steps, PARTS: gl.constexpr,
                   SEGMENT: gl.constexpr, COPIED: gl.constexpr, TAKEN: gl.constexpr, TEXT: gl.constexpr,
                   TABLE: gl.constexpr, REPEATED: gl.constexpr, BITS: gl.constexpr, BEFORE: gl.constexpr,
                   STAGE: gl.constexpr, WORDS: gl.constexpr, TILES: gl.constexpr, STORED: gl.constexpr,
                   S: gl.constexpr, R: gl.constexpr):
    """Products, (parts, batch, rows): items are tiles of 64 rows and PARTS of the columns, `steps` times 256 S each.

    R groups of S warps take items apart. `pitch` is the bytes of a row of bits, SEGMENT the rows of bits of a segment.
    COPIED, TAKEN and TEXT are `ptx.copied`, `ptx.streams` of both halves and `ptx.across`; TABLE the bytes of the
    table, STAGE those of a warp's rows of bits, WORDS those of the streams of 32 columns.
    """
    COUNT: gl.constexpr = RUN // 2 * 4
    ROOM: gl.constexpr = S * COUNT * 128
    TURNS: gl.constexpr = (COUNT + S - 1) // S
    every = filled(image, TABLE + R * (S * STAGE + ROOM), TABLE, REPEATED, COPIED, R * S)
    group, thread = every // (32 * S), every % (32 * S)
    lane, warp = thread % 32, thread // 32
    stage = begun(every) + TABLE + every // 32 * STAGE
    room = begun(every) + TABLE + R * S * STAGE + group * ROOM
    start = gl.program_id(0) * R
    _ask(stage, lane, codes, 0, gl.minimum(start + group, items - 1), steps, warp, pitch, PARTS, SEGMENT, BITS, BEFORE, S)
    ready = arrived()
    near = (xp + ready).to(gl.int64) + lane % 4 * 16 + gl.minimum(lane // 4, STORED - 1) * 64
    for base in range(start, items, gl.num_programs(0) * R):
        item = base + group
        own_item = gl.minimum(item, items - 1)
        scale, peak = (), ()
        for turn in gl.static_range(TURNS):  # asked for before they are needed
            row, column, number = _place(thread, own_item, 0, turn, PARTS, S)
            scale = scale + (gl.load(scales + row, number < COUNT, other=0.0).to(gl.float32),)
        for tile in gl.static_range(TILES):
            for turn in gl.static_range(TURNS):
                row, column, number = _place(thread, own_item, tile, turn, PARTS, S)
                peak = peak + (gl.load(peaks + ready + column, (column < batch) & (number < COUNT), other=0.0),)
        sums = ()
        for _ in gl.static_range(COUNT * TILES):
            sums = sums + (thread * 0.0,)
        for step in range(0, steps):
            last = step == steps - 1
            then = gl.minimum(gl.where(last, item + gl.num_programs(0) * R, item), items - 1)
            pointer = near + ((own_item % PARTS * steps + step) * S + warp).to(gl.int64) * (256 * STORED * 2)
            wait(lane)
            for half in gl.static_range(2):
                words = gl.inline_asm_elementwise(TAKEN[half], _stream_registers(WORDS), [stage, lane],
                                                  dtype=_integers(WORDS), is_pure=False, pack=1)
                if half == 1:  # the rows of bits are in registers
                    agree(lane)
                    _ask(stage, lane, codes, gl.where(last, 0, step + 1), then, steps, warp, pitch, PARTS, SEGMENT,
                         BITS, BEFORE, S)
                sums = gl.inline_asm_elementwise(
                    TEXT, _registers(COUNT * TILES, WORDS), sums + words + (lane, pointer + 128 * STORED * 2 * half),
                    dtype=_floats(COUNT * TILES), is_pure=False, pack=1)
        _write(sums, scale, peak, out, room, group, thread, item, items, rows, batch, PARTS, TILES, S)
    wait(lane)


@kernel
@gluon.jit(do_not_specialize=["items", "steps"])
def spread_tiles(codes, image, scales, out, first, pitch, items, steps, WIDTH: gl.constexpr, SEGMENT: gl.constexpr,
                 COPIED: gl.constexpr, TAKEN: gl.constexpr, TEXT: gl.constexpr, TABLE: gl.constexpr,
                 REPEATED: gl.constexpr, BITS: gl.constexpr, BEFORE: gl.constexpr, STAGE: gl.constexpr,
                 WORDS: gl.constexpr, S: gl.constexpr, R: gl.constexpr):
    """Rows of numbers, 16 bits each, from tile `first` on: (64 items, WIDTH)."""
    thread = filled(image, TABLE + S * STAGE, TABLE, REPEATED, COPIED, S)
    lane, warp = thread % 32, thread // 32
    stage = begun(thread) + TABLE + warp * STAGE
    first = first + arrived()
    _ask(stage, lane, codes, 0, first + gl.program_id(0), steps, warp, pitch, 1, SEGMENT, BITS, BEFORE, S)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        factors = ()
        for number in gl.static_range(RUN):
            factors = factors + (gl.load(scales + (first + item) * TILE + lane // 4 * RUN + number).to(gl.float32),)
        for step in range(0, steps):
            last = step == steps - 1
            then = first + gl.minimum(gl.where(last, item + gl.num_programs(0), item), items - 1)
            row = (item * TILE + lane // 4 * RUN).to(gl.int64)
            column = (step * S + warp) * COLUMNS + lane % 4 * 32
            pointer = (out + row * WIDTH + column).to(gl.int64)
            wait(lane)
            for half in gl.static_range(2):
                words = gl.inline_asm_elementwise(TAKEN[half], _stream_registers(WORDS), [stage, lane],
                                                  dtype=_integers(WORDS), is_pure=False, pack=1)
                if half == 1:
                    agree(lane)
                    _ask(stage, lane, codes, gl.where(last, 0, step + 1), then, steps, warp, pitch, 1, SEGMENT, BITS,
                         BEFORE, S)
                inside = (column + 128 * half < WIDTH).to(gl.int32)
                gl.inline_asm_elementwise(TEXT, _spread_registers(WORDS),
                                          words + (lane, pointer + 256 * half, inside) + factors, dtype=gl.int32,
                                          is_pure=False, pack=1)
    wait(lane)
