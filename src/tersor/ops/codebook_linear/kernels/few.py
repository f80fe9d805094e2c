"""The kernel of `codebook_linear` for up to 8 vectors, or 16 of two streams: codes become fragments in registers.

`prepare` has scaled and permuted the vectors; here the codes stream through. See README.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tersor.ops.codebook_linear.kernels.fragments import load_table, load_zeros, multiply, take_fragments, total_of
from tersor.ops.codebook_linear.shapes.limits import TILE
from tersor.ops.dispatch import kernel

WIDE = gl.constexpr(TILE)


@gluon.jit
def _fetch(ring, stage, codes, row, rows, step, wanted, BITS: gl.constexpr, ELEMENTS: gl.constexpr, RUN: gl.constexpr,
           PADDED: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    # start to copy the elements of a step of M rows to a stage of the ring: a tile for each warp
    layout: gl.constexpr = gl.BlockedLayout([1, 1, RUN], [1, 2 * RUN, 16 // RUN], [S, 1, 1], [2, 1, 0])
    m = gl.minimum(row + gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout))), rows - 1)
    base = codes + m.to(gl.int64)[None, :, None] * (3 * ELEMENTS if BITS == 3 else ELEMENTS)
    warp = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    place = (step * S + warp) * WIDE + gl.arange(0, WIDE,
                                                 layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    inside = (place < ELEMENTS) & wanted
    inside = inside & (m[None, :, None] >= 0)
    if BITS == 3:
        words = base + (place // 2) * 6 + place % 2
        for part in gl.static_range(3):
            async_copy.async_copy_global_to_shared(ring.index(stage * 3 + part), words + 2 * part, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(ring.index(stage), base + place, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _stream(ring, near, count, codes, xp, lut, table, sums, scales, zeros, row, rows, batch, groups, column_step,
            part_step, mma: gl.constexpr, BITS: gl.constexpr, ELEMENTS: gl.constexpr, RUN: gl.constexpr,
            PADDED: gl.constexpr, FORM: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, S: gl.constexpr,
            M: gl.constexpr, N: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    # sums [S, M, N] over each warp's share of M rows of codes; `count` steps were taken before
    la: gl.constexpr = gl.DotOperandLayout(0, mma, RUN)
    lb: gl.constexpr = gl.DotOperandLayout(1, mma, RUN)
    STEPS: gl.constexpr = PADDED // (S * WIDE)
    PAIRS: gl.constexpr = 16 if BITS == 3 else 16 // BITS
    total = ((rows - gl.program_id(0) * M + gl.num_programs(0) * M - 1) // (gl.num_programs(0) * M)) * STEPS
    share_b = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, lb)))[:, None, None] * WIDE
    column_b = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, lb)))[None, None, :]
    acc = gl.zeros([S, M, N], gl.float32, mma)
    more = acc
    for step in range(0, STEPS):
        start = step * (S * WIDE)
        place_b = share_b + gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(2, lb)))[None, :, None]
        others = near, step * PAIRS, xp + start + column_b * column_step + place_b, part_step, column_b < batch
        if GROUP:
            m = gl.minimum(row + gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma))), rows - 1)
            warp = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
            place = m[None, :, None] * groups + gl.minimum((start + warp * WIDE) // GROUP, groups - 1)
            n = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
            size = gl.load(sums + n * (PADDED // WIDE) + step * S + warp, n < batch, other=0.0)
            scale = gl.load(scales + place).to(gl.float32)
            if ZEROS:
                zero = load_zeros(zeros, place, BITS)
        index = count + step
        async_copy.wait_group(STAGES - 2)
        words = take_fragments(ring, index % STAGES, la, BITS)
        ahead = index + STAGES - 1
        _fetch(ring, ahead % STAGES, codes, (gl.program_id(0) + ahead // STEPS * gl.num_programs(0)) * M, rows,
               ahead % STEPS, ahead < total, BITS, ELEMENTS, RUN, PADDED, S, M)
        if GROUP:
            none = gl.zeros([S, M, N], gl.float32, mma)
            part, extra = multiply(none, none, words, others, lut, table, BITS, FORM, lb, COLUMNS)
            part = total_of(part, extra, lut, size, BITS, FORM)
            if ZEROS:
                part -= zero * size
            acc += part * scale
        else:
            acc, more = multiply(acc, more, words, others, lut, table, BITS, FORM, lb, COLUMNS)
    return acc, more


@gluon.jit
def _bring(near, xp, batch, column_step, part_step, PADDED: gl.constexpr, PAIRS: gl.constexpr, S: gl.constexpr,
           COLUMNS: gl.constexpr):
    # start to copy the other operand to shared memory, once for all rows
    if COLUMNS == 1:
        flat: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [S, 1, 1], [2, 1, 0])
        pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(1, gl.SliceLayout(2, flat)))[:, None, None]
        place = (gl.arange(0, S, layout=gl.SliceLayout(0, gl.SliceLayout(2, flat)))[None, :, None] * WIDE
                 + gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(1, flat)))[None, None, :])
        for step in gl.static_range(PADDED // (S * WIDE)):
            async_copy.async_copy_global_to_shared(near.index(step), xp + pair * part_step + step * (S * WIDE) + place)
        async_copy.commit_group()
    elif COLUMNS:
        deep: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 8, 4], [1, S, 1, 1], [3, 2, 1, 0])
        s1: gl.constexpr = gl.SliceLayout(3, deep)
        pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(1, gl.SliceLayout(2, s1)))[:, None, None, None]
        share = gl.arange(0, S, layout=gl.SliceLayout(0, gl.SliceLayout(2, s1)))[None, :, None, None]
        column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, s1)))[None, None, :, None]
        place = share * WIDE + gl.arange(0, WIDE, layout=gl.SliceLayout(
            0, gl.SliceLayout(1, gl.SliceLayout(2, deep))))[None, None, None, :]
        for step in gl.static_range(PADDED // (S * WIDE)):
            pointers = xp + pair * part_step + step * (S * WIDE) + column * column_step + place
            async_copy.async_copy_global_to_shared(near.index(step), pointers,
                                                   mask=(column < batch) & (place >= 0) & (pair >= 0))
        async_copy.commit_group()


@gluon.jit
def _begin(codes, row, rows, BITS: gl.constexpr, ELEMENTS: gl.constexpr, RUN: gl.constexpr, PADDED: gl.constexpr,
           S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    # a ring in shared memory, and the first copies to it
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    STEPS: gl.constexpr = PADDED // (S * WIDE)
    ring = gl.allocate_shared_memory(gl.int32, [3 * STAGES if BITS == 3 else STAGES, S, M, WIDE], plain)
    for step in gl.static_range(STAGES - 1):
        at = row + step // STEPS * gl.num_programs(0) * M
        _fetch(ring, step, codes, at, rows, step % STEPS, at < rows, BITS, ELEMENTS, RUN, PADDED, S, M)
    return ring


@gluon.jit
def _room(ring, STEPS: gl.constexpr, PAIRS: gl.constexpr, S: gl.constexpr, COLUMNS: gl.constexpr):
    # shared memory for the vectors, by steps to write to and by pairs of parts to read from
    small: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    deep: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    if COLUMNS == 1:
        near = gl.allocate_shared_memory(gl.int32, [STEPS, PAIRS, S, WIDE], plain)
        parts = near._reinterpret(gl.int32, [STEPS * PAIRS, S, WIDE], small)
    elif COLUMNS:
        near = gl.allocate_shared_memory(gl.int32, [STEPS, PAIRS, S, 8, WIDE], deep)
        parts = near._reinterpret(gl.int32, [STEPS * PAIRS, S, 8, WIDE], plain)
    else:
        near = ring
        parts = ring
    return near, parts


@kernel
@gluon.jit
def multiply_rows(codes0, xp0, lut0, table0, peaks0, totals0, sums0, codes1, xp1, lut1, table1, peaks1, totals1, sums1,
                  scales, zeros, out, rows, batch, groups, scale_step, column_step0, part_step0, column_step1,
                  part_step1, BITS0: gl.constexpr, ELEMENTS0: gl.constexpr, RUN0: gl.constexpr, PADDED0: gl.constexpr,
                  FORM0: gl.constexpr, BITS1: gl.constexpr, ELEMENTS1: gl.constexpr, RUN1: gl.constexpr,
                  PADDED1: gl.constexpr, FORM1: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, S: gl.constexpr,
                  M: gl.constexpr, N: gl.constexpr, MIRRORED: gl.constexpr, COLUMNS: gl.constexpr,
                  STAGES: gl.constexpr):
    """Products of M rows after M rows with N vectors; a program's S warps share each row."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    STEPS0: gl.constexpr = PADDED0 // (S * WIDE)
    STEPS1: gl.constexpr = PADDED1 // (S * WIDE)
    PAIRS0: gl.constexpr = 16 if BITS0 == 3 else 16 // BITS0
    PAIRS1: gl.constexpr = 16 if BITS1 == 3 or BITS1 == 0 else 16 // BITS1
    row = gl.program_id(0) * M
    ring0 = _begin(codes0, row, rows, BITS0, ELEMENTS0, RUN0, PADDED0, S, M, STAGES)
    if BITS1:
        ring1 = _begin(codes1, row, rows, BITS1, ELEMENTS1, RUN1, PADDED1, S, M, STAGES)
    # codes are older than the kernel before this one; what that one writes is only read from here on
    ready = 16 * gl.inline_asm_elementwise("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;",
                                           "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    n = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(0, mma)))[None, :]
    n3 = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    # the sums of the numbers go to one warp's share alone
    first = (gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None] == 0) & (n3 < batch)
    near0, parts0 = _room(ring0, STEPS0, PAIRS0, S, COLUMNS)
    _bring(near0, xp0 + ready, batch, column_step0, part_step0, PADDED0, PAIRS0, S, COLUMNS)
    lut0 = load_table(table0, lut0 + ready, BITS0, FORM0, MIRRORED)
    peak0 = gl.load(peaks0 + ready + n3, n3 < batch, other=0.0)
    total0 = gl.load(totals0 + ready + n3, first, other=0.0)
    if BITS1:
        near1, parts1 = _room(ring1, STEPS1, PAIRS1, S, COLUMNS)
        _bring(near1, xp1 + ready, batch, column_step1, part_step1, PADDED1, PAIRS1, S, COLUMNS)
        lut1 = load_table(table1, lut1 + ready, BITS1, FORM1, MIRRORED)
        peak1 = gl.load(peaks1 + ready + n3, n3 < batch, other=0.0)
        total1 = gl.load(totals1 + ready + n3, first, other=0.0)
    if COLUMNS:
        async_copy.wait_group(0)
    count = 0
    for start in range(row, rows, gl.num_programs(0) * M):
        place = start + gl.arange(0, M, layout=gl.SliceLayout(1, gl.SliceLayout(0, mma)))[:, None]
        if not GROUP:
            scale = gl.load(scales + place * scale_step, place < rows, other=0.0).to(gl.float32)
        acc, more = _stream(ring0, parts0, count * STEPS0, codes0, xp0 + ready, lut0, table0, sums0 + ready, scales,
                            zeros, start, rows, batch, groups, column_step0, part_step0, mma, BITS0, ELEMENTS0, RUN0,
                            PADDED0, FORM0, GROUP, ZEROS, S, M, N, COLUMNS, STAGES)
        if not GROUP:
            acc = total_of(acc, more, lut0, total0, BITS0, FORM0)
        acc *= peak0
        if BITS1:
            own, more = _stream(ring1, parts1, count * STEPS1, codes1, xp1 + ready, lut1, table1, sums1 + ready, scales,
                                zeros, start, rows, batch, groups, column_step1, part_step1, mma, BITS1, ELEMENTS1,
                                RUN1, PADDED1, FORM1, 0, False, S, M, N, COLUMNS, STAGES)
            acc += total_of(own, more, lut1, total1, BITS1, FORM1) * peak1
        y = gl.sum(acc, 0)
        if not GROUP:
            y *= scale
        gl.store(out + n.to(gl.int64) * rows + place, y.to(out.dtype.element_ty), (place < rows) & (n < batch))
        count += 1
