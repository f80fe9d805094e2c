"""Few vectors times streams along lines: a warp takes 32 rows, each lane some numbers of four; see `ptx.along`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.window_linear.kernels.shared import (
    arrived,
    begun,
    filled,
    shared_sums,
)
from tersor.ops.window_linear.shapes import tables

CORNERS = gl.constexpr(4)  # numbers of a lane in a product
LINES = gl.constexpr(tables.LINES)
ROWS = tables.LINES // 8  # of a lane


@gluon.constexpr_function
def _fetched_registers(words: int) -> str:
    return ",".join(["=&r"] * (words + 1) + ["l", "l"])


@gluon.constexpr_function
def _integers(count: int) -> tuple:
    return (gl.int32,) * count


@gluon.constexpr_function
def _floats(count: int) -> tuple:
    return (gl.float32,) * count


@gluon.constexpr_function
def _registers(sums: int, words: int) -> str:
    return ",".join(["=&f"] * sums + ["f"] * sums + ["r"] * (words + 1) * ROWS + ["r", "l"])


@gluon.constexpr_function
def _scaled_registers(words: int) -> str:
    return ",".join(["=r"] + ["r"] * (words + 1) + ["r", "l", "r", "f"])


@gluon.jit
def _ask(codes, row, place, line_bytes, chunks, SEGMENT: gl.constexpr, FETCHED: gl.constexpr, WORDS: gl.constexpr):
    # the words of a chunk of a row, that before them first: of its segment's end for the first chunk of a segment
    chunk = gl.minimum(place, chunks - 1)
    here = (codes + row.to(gl.int64) * line_bytes + chunk * (4 * WORDS)).to(gl.int64)
    before = here - 4 + gl.where(chunk % SEGMENT == 0, 4 * WORDS * SEGMENT, 0)
    return gl.inline_asm_elementwise(FETCHED, _fetched_registers(WORDS), [before, here], dtype=_integers(WORDS + 1),
                                     is_pure=False, pack=1)


@gluon.jit
def _place(thread, item, turn, rows, PARTS: gl.constexpr, S: gl.constexpr):
    # the row and the first vector of a sum of `shared_sums`, and whether there is one
    found = thread + turn * (32 * S)
    number, lane = found // 32, found % 32
    row = item // PARTS * LINES + number // 4 * 16 + number % 4 // 2 * 8 + lane // 4
    return row, 2 * (lane % 4) + number % 2, (number < LINES // 4) & (row < rows)


@gluon.jit
def _ask_lines(codes, first, lane, place, rows, line_bytes, chunks, SEGMENT: gl.constexpr, FETCHED: gl.constexpr,
               WORDS: gl.constexpr):
    # the same of all rows of a lane
    words = ()
    for eight in gl.static_range(LINES // 8):
        row = gl.minimum(first + lane // 4 + 8 * eight, rows - 1)
        words = words + _ask(codes, row, place, line_bytes, chunks, SEGMENT, FETCHED, WORDS)
    return words


@kernel
@gluon.jit(do_not_specialize=["items", "steps"])
def multiply_lines(codes, image, xp, peaks, scales, out, rows, batch, line_bytes, chunks, items, steps,
                   PARTS: gl.constexpr, SEGMENT: gl.constexpr, FETCHED: gl.constexpr, COPIED: gl.constexpr,
                   TEXT: gl.constexpr, TABLE: gl.constexpr, REPEATED: gl.constexpr, CHUNK: gl.constexpr,
                   WORDS: gl.constexpr, TILES: gl.constexpr, STORED: gl.constexpr, S: gl.constexpr, R: gl.constexpr):
    """Products, (parts, batch, rows): items are 32 rows and PARTS of the chunks, `steps` times 4 S each.

    R groups of S warps take items apart. SEGMENT is the chunks of a segment, of CHUNK numbers in WORDS words. FETCHED,
    COPIED and TEXT are `ptx.fetched`, `ptx.copied` and `ptx.along`; TABLE is the bytes of the table.
    """
    NUMBERS: gl.constexpr = LINES // 16 * CORNERS
    ROOM: gl.constexpr = S * NUMBERS * 128
    TURNS: gl.constexpr = (NUMBERS + S - 1) // S
    COUNT: gl.constexpr = NUMBERS * TILES
    every = filled(image, TABLE + R * ROOM, TABLE, REPEATED, COPIED, R * S)
    group, thread = every // (32 * S), every % (32 * S)
    lane, warp = thread % 32, thread // 32
    room = begun(every) + TABLE + group * ROOM
    start = gl.program_id(0) * R
    item = gl.minimum(start + group, items - 1)
    place = (item % PARTS * steps * S + warp) * 4 + lane % 4
    ahead = _ask_lines(codes, item // PARTS * LINES, lane, place, rows, line_bytes, chunks, SEGMENT, FETCHED, WORDS)
    ready = arrived()
    near = (xp + ready).to(gl.int64) + lane % 4 * 16 + gl.minimum(lane // 4, STORED - 1) * 64
    for base in range(start, items, gl.num_programs(0) * R):
        item = base + group
        own_item = gl.minimum(item, items - 1)
        scale, peak = (), ()
        for turn in gl.static_range(TURNS):  # asked for before they are needed
            row, column, inside = _place(thread, own_item, turn, rows, PARTS, S)
            scale = scale + (gl.load(scales + row, inside, other=0.0).to(gl.float32),)
        for tile in gl.static_range(TILES):
            for turn in gl.static_range(TURNS):
                row, column, inside = _place(thread, own_item, turn, rows, PARTS, S)
                peak = peak + (gl.load(peaks + ready + column + 8 * tile, inside & (column + 8 * tile < batch),
                                       other=0.0),)
        sums = ()
        for _ in gl.static_range(COUNT):
            sums = sums + (thread * 0.0,)
        for step in range(0, steps):
            words = ahead
            last = step == steps - 1
            then = gl.minimum(gl.where(last, item + gl.num_programs(0) * R, item), items - 1)
            place = ((then % PARTS * steps + gl.where(last, 0, step + 1)) * S + warp) * 4 + lane % 4
            ahead = _ask_lines(codes, then // PARTS * LINES, lane, place, rows, line_bytes, chunks, SEGMENT, FETCHED,
                               WORDS)
            pointer = near + ((own_item % PARTS * steps + step) * S + warp).to(gl.int64) * (4 * CHUNK * STORED * 2)
            sums = gl.inline_asm_elementwise(TEXT, _registers(COUNT, WORDS), sums + words + (lane, pointer),
                                             dtype=_floats(COUNT), is_pure=False, pack=1)
        for tile in gl.static_range(TILES):
            own = ()
            for one in gl.static_range(LINES // 16):
                own = own + sums[4 * (one * TILES + tile) : 4 * (one * TILES + tile) + 4]
            totals = shared_sums(own, room, group, thread, S)
            for turn in gl.static_range(TURNS):
                row, column, inside = _place(thread, own_item, turn, rows, PARTS, S)
                line = (own_item % PARTS * batch + column + 8 * tile).to(gl.int64) * rows
                y = totals[turn] * peak[tile * TURNS + turn] * scale[turn]
                gl.store(out + line + row, y.to(out.dtype.element_ty), inside & (column + 8 * tile < batch)
                         & (item < items))


@kernel
@gluon.jit(do_not_specialize=["items", "steps"])
def spread_lines(codes, image, scales, out, first, rows, width, line_bytes, chunks, items, steps,
                 SEGMENT: gl.constexpr, FETCHED: gl.constexpr, COPIED: gl.constexpr, TEXT: gl.constexpr,
                 TABLE: gl.constexpr, REPEATED: gl.constexpr, CHUNK: gl.constexpr, WORDS: gl.constexpr,
                 S: gl.constexpr, R: gl.constexpr):
    """Rows of numbers, 16 bits each, from row `first` on: (rows, width); items are 8 rows, `steps` times 4 S chunks."""
    thread = filled(image, TABLE, TABLE, REPEATED, COPIED, S)
    lane, warp = thread % 32, thread // 32
    first = first + arrived()
    row = gl.minimum(gl.program_id(0) * 8 + lane // 4, rows - 1)
    ahead = _ask(codes, first + row, warp * 4 + lane % 4, line_bytes, chunks, SEGMENT, FETCHED, WORDS)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        own = item * 8 + lane // 4
        scale = gl.load(scales + first + gl.minimum(own, rows - 1)).to(gl.float32)
        for step in range(0, steps):
            words = ahead
            last = step == steps - 1
            then = gl.minimum(gl.where(last, item + gl.num_programs(0), item), items - 1)
            row = gl.minimum(then * 8 + lane // 4, rows - 1)
            place = (gl.where(last, 0, step + 1) * S + warp) * 4 + lane % 4
            ahead = _ask(codes, first + row, place, line_bytes, chunks, SEGMENT, FETCHED, WORDS)
            chunk = (step * S + warp) * 4 + lane % 4
            inside = ((chunk < chunks) & (own < rows)).to(gl.int32)
            pointer = (out + own.to(gl.int64) * width + chunk * CHUNK).to(gl.int64)
            gl.inline_asm_elementwise(TEXT, _scaled_registers(WORDS),
                                      words + (lane, pointer, inside, scale), dtype=gl.int32, is_pure=False, pack=1)
