"""What the kernels of windows share: shared memory, its table, copies to it, and sums over warps; see `ptx.py`.

Text in PTX addresses shared memory by Triton's name for its beginning, so a kernel allocates once, and the table lies
first. `filled` looks whether it does, and traps where not.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.window_linear.shapes import tables

PAGE = gl.constexpr(1024)  # words of shared memory that are stored together
COLUMNS = gl.constexpr(tables.COLUMNS)
GROUPS = gl.constexpr(tables.GROUPS)
RUN = gl.constexpr(tables.RUN)
TILE = gl.constexpr(tables.GROUPS * tables.RUN)
ROW_BYTES = gl.constexpr(tables.COLUMNS // 8)


@gluon.constexpr_function
def pages(count: int) -> int:
    """Return how many pages so many bytes are."""
    return -(-count // 4096)


@gluon.constexpr_function
def _shares(warps: int, step: int) -> str:
    """Return PTX: the sum of the float32 numbers of all warps, $1 the address of the first's."""
    lines = ["{", ".reg .f32 part;", "ld.shared.f32 $0, [$1];"]
    for warp in range(1, warps):
        lines += [f"ld.shared.f32 part, [$1+{warp * step}];", "add.f32 $0, $0, part;"]
    return "\n".join([*lines, "}"])


@gluon.jit
def threads(S: gl.constexpr):
    """Return the numbers of S warps' threads."""
    return gl.arange(0, 32 * S, layout=gl.BlockedLayout([1], [32], [S], [0]))


@gluon.jit
def begun(like):
    """Return the address at which shared memory begins, for every thread."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [like], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def begins_with(thread, held):
    """Trap where shared memory does not begin, at the address that text in PTX takes for it, with threads' words."""
    gl.inline_asm_elementwise("""{
        .reg .pred wrong;
        .reg .b32 found;
        ld.shared.b32 found, [$1];
        setp.ne.b32 wrong, found, $2;
        @wrong trap;
        mov.b32 $0, found;
    }""", "=r,r,r", [begun(thread) + 4 * thread, held], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def filled(image, BYTES: gl.constexpr, TABLE: gl.constexpr, REPEATED: gl.constexpr, COPIED: gl.constexpr,
           S: gl.constexpr):
    """Allocate BYTES of shared memory and fill the first TABLE with the words of an image; return the threads' numbers.

    Each word is there 2**REPEATED times. COPIED is `ptx.copied`.
    """
    memory = gl.allocate_shared_memory(gl.int32, [pages(BYTES), PAGE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    place = gl.arange(0, PAGE, layout=gl.BlockedLayout([4], [32], [S], [0]))
    memory.index(0).store(gl.load(image + (place >> REPEATED)))
    gl.thread_barrier()
    thread = threads(S)
    begins_with(thread, gl.load(image + (thread >> REPEATED)))
    first = (image + (4 * thread >> REPEATED)).to(gl.int64)
    gl.inline_asm_elementwise(COPIED, "=r,r,l", [16 * thread, first], dtype=gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()
    return thread


@gluon.jit
def arrived():
    """Let the kernel after this one start, wait for the one before; return 0."""
    return 16 * gl.inline_asm_elementwise("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;",
                                          "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fetch(stage, lane, codes, column, first, wraps, pitch, BITS: gl.constexpr, BEFORE: gl.constexpr):
    """Start to copy the rows of bits of a tile, and those before it, 32 bytes of each, for a warp.

    `first` is the row of bits that the tile begins with, `wraps` what rows before it are added where they are those at
    the end of the segment. A lane's run has BITS rows, after BEFORE.
    """
    UNITS: gl.constexpr = 2 * (BEFORE + GROUPS * BITS)
    for turn in gl.static_range((UNITS + 31) // 32):
        unit = lane + 32 * turn
        row = unit // 2
        there = stage + ((unit ^ (row // BITS & 7)) << 4)
        place = first + row - BEFORE
        if 16 * turn < BEFORE:
            place += gl.where(row < BEFORE, wraps, 0)
        inside = (unit < UNITS).to(gl.int32)
        near = gl.minimum(column + 16 * (unit % 2), pitch - 16)
        address = (codes + place.to(gl.int64) * pitch + near).to(gl.int64)
        gl.inline_asm_elementwise("""{
            .reg .pred inside;
            setp.ne.b32 inside, $3, 0;
            @inside cp.async.cg.shared.global [$1], [$2], 16;
            mov.b32 $0, 0;
        }""", "=r,r,l,r", [there, address, inside], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise("cp.async.commit_group; mov.b32 $0, 0;", "=r,r", [lane], dtype=gl.int32, is_pure=False,
                              pack=1)


@gluon.jit
def agree(lane):
    """Let the lanes of a warp wait for one another."""
    gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r,r", [lane], dtype=gl.int32, is_pure=False,
                              pack=1)


@gluon.jit
def wait(lane):
    """Wait until a warp's copies are there for all its lanes."""
    gl.inline_asm_elementwise("cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r,r", [lane],
                              dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _keep(count: int) -> str:
    """Return PTX: numbers $2 … to shared memory at $1, 128 bytes apart."""
    return "\n".join([f"st.shared.f32 [$1+{128 * place}], ${2 + place};" for place in range(count)]
                     + ["mov.b32 $0, 0;"])


@gluon.constexpr_function
def kept_constraints(count: int) -> str:
    """Return the constraints of `_keep`."""
    return ",".join(["=r", "r"] + ["f"] * count)


@gluon.constexpr_function
def _meet(threads: int) -> str:
    return f"bar.sync $1, {threads}; mov.b32 $0, 0;"


@gluon.jit
def shared_sums(sums, room, group, thread, S: gl.constexpr):
    """Return the sums over the S warps of a group, of tuples of numbers: tuples of numbers a thread.

    Number after number, of lane after lane. `room` is the address of shared memory for all of a group's.
    """
    COUNT: gl.constexpr = len(sums)
    own = room + thread // 32 * (128 * COUNT) + thread % 32 * 4
    gl.inline_asm_elementwise(_meet(32 * S), "=r,r", [group + 1], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(_keep(COUNT), kept_constraints(COUNT), (own,) + sums, dtype=gl.int32, is_pure=False,
                              pack=1)
    gl.inline_asm_elementwise(_meet(32 * S), "=r,r", [group + 1], dtype=gl.int32, is_pure=False, pack=1)
    totals = ()
    for turn in gl.static_range((COUNT + S - 1) // S):
        there = room + gl.minimum(thread + turn * (32 * S), 32 * COUNT - 1) * 4
        totals = totals + (gl.inline_asm_elementwise(_shares(S, 128 * COUNT), "=&f,r", [there], dtype=gl.float32,
                                                     is_pure=False, pack=1),)
    return totals
