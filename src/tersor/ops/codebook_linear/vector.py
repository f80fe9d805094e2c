"""The kernel of `codebook_linear` for one vector: exact integer products with three 8-bit digits of its numbers.

A program keeps the digits in shared memory and walks over its rows; codes reach shared memory ahead of it. See README.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tersor.ops.codebook_linear.arrival import ACROSS, DIGITS, arrive
from tersor.ops.codebook_linear.digits import load_levels, multiply_digits, parts_of, sums_of, weigh


@gluon.constexpr_function
def _dot(index: int, warps: int):
    """Return the layout of an operand of the products."""
    return gl.DotOperandLayout(index, gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8]), 4)


@gluon.constexpr_function
def _doubled(warps: int):
    """Return the layout of [warps, 32, 2, 4] words whose last dimensions, taken together, are columns of an operand.

    A lane's eight words lie together: what one product takes of them, its two registers, are neighbours.
    """
    shares = [[1 << bit, 0, 0, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        lane_bases=[[0, 8, 0, 0], [0, 16, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0]],
        warp_bases=shares, block_bases=[], shape=[warps, 32, 2, 4])


@gluon.jit
def _place_of(matrices, starts, row):
    # the matrix that a row is of, of several whose rows follow one another, and the row's number in it
    found = matrices[0]
    begin = 0
    for number in gl.static_range(len(starts)):
        later = row >= starts[number]
        found = gl.where(later, matrices[number + 1], found)
        begin = gl.where(later, starts[number], begin)
    return found, row - begin


@gluon.jit
def _later(row, rows, tiles, GATED: gl.constexpr, M: gl.constexpr):
    # the row so many tiles of this program after those at `row`, and whether there is one; see `multiply_vector`
    if GATED:
        near = row + tiles // 2 * (gl.num_programs(0) * M)
        return near + tiles % 2 * rows, near < rows
    else:
        near = row + tiles * (gl.num_programs(0) * M)
        return near, near < rows


@gluon.jit
def _fetch(ring, stage, matrices, starts, row, rows, step, wanted, BITS: gl.constexpr, WORDS: gl.constexpr,
           WHOLE: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    # start to copy a step of M rows to a stage of the ring
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 4, 8], [S, 1, 1], [2, 1, 0])
    TIMES: gl.constexpr = 3 if BITS == 3 else 1
    m = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    if not WHOLE:
        m = gl.minimum(m, rows - 1 - row)
    warp = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    place = warp * ACROSS + gl.arange(0, ACROSS, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    inside = wanted & (m >= 0)[None, :, None] & (place >= 0)
    if WORDS % (S * ACROSS) != 0:
        inside = inside & (place + step * (S * ACROSS) < WORDS)
    codes, near = _place_of(matrices, starts, row)
    start = codes + near.to(gl.int64) * (TIMES * WORDS) + step * (S * ACROSS * TIMES)
    if BITS == 3:  # a lane's places are twelve words, its first four, second and third
        words = start + (m[None, :, None] * (3 * WORDS) + place // 4 * 12 + place % 4)
        for part in gl.static_range(3):
            async_copy.async_copy_global_to_shared(ring.index(stage * 3 + part), words + 4 * part, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(ring.index(stage), start + (m[None, :, None] * WORDS + place), mask=inside)
    async_copy.commit_group()


@gluon.jit
def _begin(codes, starts, row, rows, BITS: gl.constexpr, WORDS: gl.constexpr, STEPS: gl.constexpr,
           GATED: gl.constexpr, WHOLE: gl.constexpr, S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    # a ring in shared memory, and the first copies to it
    layout: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [2, 1, 0])
    ring = gl.allocate_shared_memory(gl.int32, [3 * STAGES if BITS == 3 else STAGES, S, M, ACROSS], layout)
    for step in gl.static_range(STAGES):
        at, wanted = _later(row, rows, step // STEPS, GATED, M)
        _fetch(ring, step, codes, starts, at, rows, step % STEPS, wanted, BITS, WORDS, WHOLE, S, M)
    return ring


@gluon.jit
def _take(ring, stage, layout: gl.constexpr, BITS: gl.constexpr):
    # a stage's words as fragments
    if BITS == 3:
        return ring.index(stage * 3).load(layout), ring.index(stage * 3 + 1).load(layout), ring.index(stage * 3 + 2).load(layout)
    else:
        return (ring.index(stage).load(layout),)


@gluon.jit
def _stream(ring, digits, stage, codes, starts, tables, row, rows, BITS: gl.constexpr, FORM: gl.constexpr,
            WORDS: gl.constexpr, STEPS: gl.constexpr, GATED: gl.constexpr, SECOND: gl.constexpr, WHOLE: gl.constexpr,
            S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    # integer sums [S, M, 8] over each warp's share of M rows, whose first step is in `stage`; and the stage after them
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    sums = ()
    for _ in gl.static_range(sums_of(BITS)):
        sums = sums + (gl.zeros([S, M, 2 * DIGITS], gl.int32, mma),)
    for step in range(0, STEPS):
        async_copy.wait_group(STAGES - 1)
        words = _take(ring, stage, _dot(0, S), BITS)
        later, wanted = _later(row, rows, SECOND + (step + STAGES) // STEPS, GATED, M)
        _fetch(ring, stage, codes, starts, later, rows, (step + STAGES) % STEPS, wanted, BITS, WORDS, WHOLE, S, M)
        sums = multiply_digits(sums, words, digits, step * parts_of(BITS), tables, _dot(1, S), _doubled(S), BITS, FORM)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    return sums, stage


@gluon.jit
def _scale(scales, starts, row, m, rows, scale_step):
    # the scales of rows from `row` on
    near, first = _place_of(scales, starts, row)
    return gl.load(near + (first + m) * scale_step, row + m < rows, other=0.0).to(gl.float32)


@gluon.jit
def _summed(parts, offset, scale):
    # the sum of all warps' parts, scaled
    return gl.convert_layout(gl.sum(gl.sum(parts, 2), 0) + offset, scale.type.layout) * scale


@gluon.jit
def multiply_vector(x0, codes0, table0, signs0, x1, codes1, table1, signs1, scales, starts, norm, eps, added, out, rows,
                    scale_step, WIDTH0: gl.constexpr, BITS0: gl.constexpr, FORM0: gl.constexpr, WIDTH1: gl.constexpr,
                    BITS1: gl.constexpr, FORM1: gl.constexpr, MIRRORED: gl.constexpr, ROTATED: gl.constexpr,
                    NORMED: gl.constexpr, ADDS: gl.constexpr, GATED: gl.constexpr, WHOLE: gl.constexpr, S: gl.constexpr,
                    M: gl.constexpr, STAGES: gl.constexpr):
    """The product of M rows after M rows with a vector, of one stream or the sum of two; S warps share each row.

    Codes and scales are tuples: of one matrix, or of several whose rows follow one another; all but the first begin at
    `starts`, multiples of M. The vector may be brought to a root mean square of 1 and multiplied by `norm` before it is
    rotated; `added` is added to the product. GATED: of two matrices, whose tiles are taken by turns; what is written is
    the second's product times the first's through x / (1 + exp(-x)).
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    WORDS0: gl.constexpr = WIDTH0 // (4 * parts_of(BITS0))
    STEPS0: gl.constexpr = (WORDS0 + S * ACROSS - 1) // (S * ACROSS)
    WORDS1: gl.constexpr = WIDTH1 // (4 * parts_of(BITS1)) if BITS1 else 0
    STEPS1: gl.constexpr = (WORDS1 + S * ACROSS - 1) // (S * ACROSS)
    row = gl.program_id(0) * M
    ring0 = _begin(codes0, starts, row, rows, BITS0, WORDS0, STEPS0, GATED, WHOLE, S, M, STAGES)
    low0, units0, tables0 = load_levels(table0, BITS0, FORM0, MIRRORED)
    if BITS1:
        low1, units1, tables1 = load_levels(table1, BITS1, FORM1, MIRRORED)
        ring1 = _begin(codes1, starts, row, rows, BITS1, WORDS1, STEPS1, False, WHOLE, S, M, STAGES)
    near0, near1, ready = arrive(x0, signs0, x1, signs1, norm, eps, WIDTH0, BITS0, FORM0, STEPS0, WIDTH1, BITS1, FORM1,
                                  STEPS1, ROTATED, NORMED, S)
    digits0, unit0, sum0 = near0
    offset = low0 * sum0
    if BITS1:
        digits1, unit1, sum1 = near1
        offset += low1 * sum1
    column = gl.arange(0, 2 * DIGITS, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    digit = gl.where(column == 0, 1.0, gl.where(column == 1, 256.0, gl.where(column == 2, 65536.0, 0.0)))
    m = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma)))
    stage0 = 0
    stage1 = 0
    for start in range(row, rows, gl.num_programs(0) * M):
        scale = _scale(scales, starts, start, m, rows, scale_step)
        if ADDS:
            other = gl.load(added + ready + start + m, start + m < rows, other=0.0).to(gl.float32)
        sums, stage0 = _stream(ring0, digits0, stage0, codes0, starts, tables0, start, rows, BITS0, FORM0, WORDS0,
                               STEPS0, GATED, 0, WHOLE, S, M, STAGES)
        total = weigh(sums, units0, BITS0) * unit0
        if BITS1:
            sums, stage1 = _stream(ring1, digits1, stage1, codes1, starts, tables1, start, rows, BITS1, FORM1, WORDS1,
                                   STEPS1, False, 0, WHOLE, S, M, STAGES)
            total += weigh(sums, units1, BITS1) * unit1
        y = _summed(total * digit, offset, scale)
        if GATED:
            scale = _scale(scales, starts, start + rows, m, 2 * rows, scale_step)
            sums, stage0 = _stream(ring0, digits0, stage0, codes0, starts, tables0, start, rows, BITS0, FORM0, WORDS0,
                                   STEPS0, GATED, 1, WHOLE, S, M, STAGES)
            y = y / (1.0 + gl.exp(-y)) * _summed(weigh(sums, units0, BITS0) * unit0 * digit, offset, scale)
        if ADDS:
            y += other
        gl.store(out + start + m, y.to(out.dtype.element_ty), start + m < rows)
