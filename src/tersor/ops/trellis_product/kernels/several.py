"""Several vectors times signs of streams along outputs: bits that rows share with the vectors' planes are counted.

A program keeps the planes of its vectors, of one part of the columns, in shared memory, and takes block after block of
rows. Signs come by `cp.async` into a ring, 1,024 of each row at a time. See README.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.trellis_product.shapes import several as shapes
from tersor.ops.window_linear.kernels.shared import PAGE, arrived, begins_with, begun, pages, threads

WARPS = gl.constexpr(shapes.WARPS)
THREADS = gl.constexpr(32 * shapes.WARPS)
ROW_BYTES = gl.constexpr(shapes.STEP_COLUMNS // 8)


@gluon.constexpr_function
def _registers(counts: int) -> str:
    return ",".join(["=&r"] * counts + ["r"] * (counts + 3))


@gluon.constexpr_function
def _integers(count: int) -> tuple:
    return (gl.int32,) * count


@gluon.jit
def _room(BYTES: gl.constexpr):
    # shared memory, and whether it begins where text in PTX takes it to begin
    memory = gl.allocate_shared_memory(gl.int32, [pages(BYTES), PAGE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    place = gl.arange(0, PAGE, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    memory.index(0).store(place ^ 0x5A5A)
    gl.thread_barrier()
    thread = threads(WARPS)
    begins_with(thread, thread ^ 0x5A5A)
    gl.thread_barrier()
    return thread


@gluon.jit
def _begin(thread, barrier):
    # a barrier for one arrival and the bytes that it names
    gl.inline_asm_elementwise("""{
        .reg .pred first;
        setp.eq.s32 first, $2, 0;
        @first mbarrier.init.shared::cta.b64 [$1], 1;
        fence.proxy.async.shared::cta;
        mov.b32 $0, 0;
    }""", "=r,r,r", [barrier, thread], dtype=gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()


@gluon.jit
def _fetch(stage, thread, codes, first, step, rows, pitch, inside, OWN: gl.constexpr, SHARING: gl.constexpr):
    # start to copy 1,024 signs of a warp's rows, or of the warps' that share them; units of 16 bytes lie at their
    # place xor the row
    unit = thread % 8
    column = gl.minimum(step * ROW_BYTES + unit * 16, pitch - 16)
    for turn in gl.static_range(OWN // (4 * SHARING)):
        row = thread // 8 + turn * (4 * SHARING)
        there = stage + row * ROW_BYTES + ((unit ^ row % 8) << 4)
        own = gl.minimum(first + row, rows - 1)
        address = (codes + own.to(gl.int64) * pitch + column).to(gl.int64)
        gl.inline_asm_elementwise("""{
            .reg .pred inside;
            setp.ne.b32 inside, $3, 0;
            @inside cp.async.cg.shared.global [$1], [$2], 16;
            mov.b32 $0, 0;
        }""", "=r,r,l,r", [there, address, (thread * 0 + inside)], dtype=gl.int32,
                                  is_pure=False, pack=1)
    gl.inline_asm_elementwise("cp.async.commit_group; mov.b32 $0, 0;", "=r,r", [thread], dtype=gl.int32, is_pure=False,
                              pack=1)


@gluon.jit
def _next(block, step, steps):
    # the step after one: of the block, or the first of the program's next block
    turned = step + 1 == steps
    return block + gl.where(turned, gl.num_programs(0), 0), gl.where(turned, 0, step + 1)


@gluon.constexpr_function
def _waited(left: int, sharing: int) -> str:
    # until a warp's copies are there, and those of the warps that share its rows
    meet = "bar.warp.sync 0xffffffff" if sharing == 1 else f"bar.sync $1, {32 * sharing}"
    return f"cp.async.wait_group {left}; {meet}; mov.b32 $0, 0;"


@gluon.jit
def _write(counts, out, row, vector, rows, batch, PLANES: gl.constexpr, TILES: gl.constexpr):
    # planes weighed, the highest as the sign; out is (batch, rows)
    near = out + (vector.to(gl.int64) * rows + row)
    next_one = near + rows
    left, even, odd = rows - row, vector < batch, vector + 1 < batch
    for tile in gl.static_range(TILES):
        for corner in gl.static_range(4):
            total = -counts[(tile * PLANES + PLANES - 1) * 4 + corner]
            for plane in gl.static_range(PLANES - 1):
                total = 2 * total + counts[(tile * PLANES + PLANES - 2 - plane) * 4 + corner]
            place = 16 * tile + 8 * (corner // 2)
            gl.store((next_one if corner % 2 else near) + place, total, (place < left) & (odd if corner % 2 else even))


@kernel
@gluon.jit(do_not_specialize=["blocks", "steps", "every"])
def count_several(codes, planes, out, rows, batch, pitch, blocks, steps, every, TEXT: gl.constexpr,
                  BROUGHT: gl.constexpr, AWAITED: gl.constexpr, PARTS: gl.constexpr, PLANES: gl.constexpr,
                  EIGHTS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr):
    """What numbers of vectors the set signs of each row add up to, int32 (parts, batch, rows).

    A program has every so many blocks of 16 TILES WARPS / EIGHTS rows, EIGHTS times eight vectors, and `steps` (at most
    STEPS) of `every` 1,024 columns. TEXT, BROUGHT and AWAITED are `several_ptx.counted`, `brought` and `awaited`.
    """
    OWN: gl.constexpr = 16 * TILES
    ROWS: gl.constexpr = OWN * WARPS // EIGHTS
    STAGE: gl.constexpr = ROWS * ROW_BYTES
    STEP: gl.constexpr = EIGHTS * PLANES // 2 * 512 * 4
    COUNT: gl.constexpr = TILES * PLANES * 4
    thread = _room(STAGES * STAGE + STEPS * STEP + 16)
    lane, warp = thread % 32, thread // 32
    start = begun(thread)
    near = start + STAGES * STAGE
    barrier = near + STEPS * STEP
    team, mate = warp // EIGHTS, thread % (32 * EIGHTS)  # warps that share rows, and a thread of theirs
    ring = start + team * (OWN * ROW_BYTES)
    line = team * OWN
    part, group = gl.program_id(1) % PARTS, gl.program_id(1) // PARTS
    first = part * steps
    own = gl.minimum(steps, every - first)
    ahead_block, ahead = gl.program_id(0), 0
    _begin(thread, barrier)
    for stage in gl.static_range(STAGES - 1):
        _fetch(ring + stage * STAGE, mate, codes, ahead_block * ROWS + line, first + ahead, rows, pitch,
               (ahead_block < blocks).to(gl.int32), OWN, EIGHTS)
        ahead_block, ahead = _next(ahead_block, ahead, own)
    ready = arrived()
    source = (planes + ready + (group * every + first).to(gl.int64) * (STEP // 4)).to(gl.int64)
    gl.inline_asm_elementwise(BROUGHT, "=r,r,r,r,r,l", [(thread == 0).to(gl.int32), near, barrier, thread * 0 + own * STEP,
                                                        source], dtype=gl.int32, is_pure=False, pack=1)
    eight = warp % EIGHTS
    where = lane % 16 * ROW_BYTES
    words = near + eight * (PLANES // 2 * 512) + lane * 16
    vector = (group * EIGHTS + eight) * 8 + lane % 4 * 2
    out += ready + part.to(gl.int64) * rows * batch
    gl.inline_asm_elementwise(AWAITED, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)
    stage = 0
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        counts = ()
        for _ in gl.static_range(COUNT):
            counts = counts + (thread * 0,)
        for step in range(0, own):
            gl.inline_asm_elementwise(_waited(STAGES - 2, EIGHTS), "=r,r", [team + 1], dtype=gl.int32, is_pure=False, pack=1)
            free = gl.where(stage == 0, STAGES - 1, stage - 1)
            _fetch(ring + free * STAGE, mate, codes, ahead_block * ROWS + line, first + ahead, rows, pitch,
                   (ahead_block < blocks).to(gl.int32), OWN, EIGHTS)
            ahead_block, ahead = _next(ahead_block, ahead, own)
            counts = gl.inline_asm_elementwise(
                TEXT, _registers(COUNT), counts + (lane, ring + stage * STAGE + where, words + step * STEP),
                dtype=_integers(COUNT), is_pure=False, pack=1)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        _write(counts, out, block * ROWS + line + lane // 4, vector, rows, batch, PLANES, TILES)
    gl.inline_asm_elementwise(_waited(0, EIGHTS), "=r,r", [team + 1], dtype=gl.int32, is_pure=False, pack=1)
