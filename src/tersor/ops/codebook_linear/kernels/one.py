"""The kernel of `codebook_linear` for one vector: exact integer products with digits or bits of its numbers.

A program keeps the digits in shared memory and walks over its rows; codes reach shared memory ahead of it. See
README.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tersor.ops.codebook_linear import shapes
from tersor.ops.codebook_linear.kernels.arrival import ACROSS, DIGITS, arrive, digest
from tersor.ops.codebook_linear.kernels.digits import load_levels, multiply_digits, parts_of, sums_of, weigh
from tersor.ops.codebook_linear.kernels.planes import (
    in_planes,
    multiply_planes,
    no_sums,
    rows_together,
    take_codes,
    weigh_planes,
)
from tersor.ops.dispatch import kernel


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


@gluon.constexpr_function
def _codes_of(bits: int) -> int:
    """Return the codes of a word, of three words of 3-bit codes."""
    return shapes.limits.CODES[bits]


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
    # three copies share the sectors of 3-bit codes: of 8 bytes, through the L1 cache, and soon one after another
    TIMES: gl.constexpr = 3 if BITS == 3 else 1
    BLOCK: gl.constexpr = rows_together(BITS, M)
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 2] if BITS == 3 else [1, 1, 4],
                                            [1, 2, 16] if BITS == 3 else [1, 4, 8], [S, 1, 1], [2, 1, 0])
    warp = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    place = warp * ACROSS + gl.arange(0, ACROSS, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    inside = wanted & (place >= 0)
    if WORDS % (S * ACROSS) != 0:
        inside = inside & (place + step * (S * ACROSS) < WORDS)
    codes, near = _place_of(matrices, starts, row)
    start = codes + near.to(gl.int64) * (TIMES * WORDS) + step * (S * ACROSS * TIMES)
    for block in gl.static_range(M // BLOCK):
        m = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
        if not WHOLE:
            m = gl.minimum(m, rows - 1 - row)
        # a lane's four places of 3-bit codes are twelve words, four in each part
        words = start + (m * (3 * WORDS) + place // 4 * 12 + place % 4 if BITS == 3 else m * WORDS + place)
        for part in gl.static_range(TIMES):
            at = (stage * TIMES + part) * (M // BLOCK) + block
            async_copy.async_copy_global_to_shared(ring.index(at), words + 4 * part, mask=inside & (m >= 0))
    async_copy.commit_group()


@gluon.jit
def _ring(BITS: gl.constexpr, S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    # a ring in shared memory
    layout: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [2, 1, 0])
    BLOCK: gl.constexpr = rows_together(BITS, M)
    PARTS: gl.constexpr = M // BLOCK * (3 if BITS == 3 else 1)
    return gl.allocate_shared_memory(gl.int32, [STAGES * PARTS, S, BLOCK, ACROSS], layout)


@gluon.jit
def _fill(ring0, codes0, ring1, codes1, starts, row, rows, FIRST: gl.constexpr, LAST: gl.constexpr, RUN: gl.constexpr,
          BITS0: gl.constexpr, WORDS0: gl.constexpr, STEPS0: gl.constexpr, BITS1: gl.constexpr, WORDS1: gl.constexpr,
          STEPS1: gl.constexpr, GATED: gl.constexpr, WHOLE: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    # start the copies to stages of fresh rings, by turns
    for first in gl.static_range(FIRST, LAST, RUN):
        for step in gl.static_range(first, first + RUN):
            at, wanted = _later(row, rows, step // STEPS0, GATED, M)
            _fetch(ring0, step, codes0, starts, at, rows, step % STEPS0, wanted, BITS0, WORDS0, WHOLE, S, M)
        if BITS1:
            for step in gl.static_range(first, first + RUN):
                at, wanted = _later(row, rows, step // STEPS1, GATED, M)
                _fetch(ring1, step, codes1, starts, at, rows, step % STEPS1, wanted, BITS1, WORDS1, WHOLE, S, M)


@gluon.constexpr_function
def _run(steps0: int, steps1: int, stages: int) -> int:
    """Return how many steps of a stream are asked for in turn with the other's: all of a row's, where rings hold them.

    Copies are waited for in the order in which they were asked for, which then is the order of their use.
    """
    if steps1 == 0:
        return 1
    return steps0 if steps0 == steps1 and stages % steps0 == 0 else stages


@gluon.constexpr_function
def _under_way(steps0: int, steps1: int, stages: int) -> int:
    """Return how many copies may be under way when the next is used."""
    return (2 if steps1 and _run(steps0, steps1, stages) == steps0 else 1) * stages - 1


@gluon.jit
def _stream(ring, digits, stage, codes, starts, units, tables, row, rows, BITS: gl.constexpr, FORM: gl.constexpr,
            BYTES: gl.constexpr, WORDS: gl.constexpr, STEPS: gl.constexpr, TOGETHER: gl.constexpr, GATED: gl.constexpr,
            SECOND: gl.constexpr, WHOLE: gl.constexpr, S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
            WAITS: gl.constexpr):
    # products [S, M] of M rows, of which each warp has a share; the first step is in `stage`. And the stage after them
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    if in_planes(BITS, FORM):
        sums = no_sums(BITS, FORM, BYTES, S, M)
    else:
        sums = ()
        for _ in gl.static_range(sums_of(BITS)):
            sums = sums + (gl.zeros([S, M, 2 * DIGITS], gl.int32, mma),)
    for step in range(0, STEPS):
        async_copy.wait_group(WAITS)
        words = take_codes(ring, stage, BITS, S, M) if in_planes(BITS, FORM) else (ring.index(stage).load(_dot(0, S)),)
        later, wanted = _later(row, rows, SECOND + (step + STAGES) // STEPS, GATED, M)
        _fetch(ring, stage, codes, starts, later, rows, (step + STAGES) % STEPS, wanted, BITS, WORDS, WHOLE, S, M)
        if in_planes(BITS, FORM):
            sums = multiply_planes(sums, words, digits, step, BITS, FORM, BYTES, TOGETHER, S, M)
        else:
            sums = multiply_digits(sums, words, digits, step * parts_of(BITS), tables, _dot(1, S), _doubled(S), BITS)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    if in_planes(BITS, FORM):
        total = weigh_planes(sums, units, BITS, FORM, BYTES, S, M)
    else:
        column = gl.arange(0, 2 * DIGITS, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
        digit = gl.where(column == 0, 1.0, gl.where(column == 1, 256.0, gl.where(column == 2, 65536.0, 0.0)))
        total = gl.sum(weigh(sums, units, BITS) * digit, 2)
    return gl.convert_layout(total, gl.SliceLayout(2, mma)), stage


@gluon.jit
def _scale(scales, starts, row, m, rows, scale_step):
    # the scales of rows from `row` on
    near, first = _place_of(scales, starts, row)
    return gl.load(near + (first + m) * scale_step, row + m < rows, other=0.0).to(gl.float32)


@gluon.jit
def _summed(parts, offset, scale):
    # the sum of all warps' parts, scaled
    return gl.convert_layout(gl.sum(parts, 0) + offset, scale.type.layout) * scale


@kernel
@gluon.jit
def multiply_vector(x0, codes0, table0, signs0, x1, codes1, table1, signs1, scales, starts, norm, eps, added, out, rows,
                    scale_step, WIDTH0: gl.constexpr, BITS0: gl.constexpr, FORM0: gl.constexpr, WIDTH1: gl.constexpr,
                    BITS1: gl.constexpr, FORM1: gl.constexpr, TOGETHER0: gl.constexpr, TOGETHER1: gl.constexpr,
                    BYTES: gl.constexpr, MIRRORED: gl.constexpr, ROTATED: gl.constexpr, NORMED: gl.constexpr,
                    ADDS: gl.constexpr, GATED: gl.constexpr, WHOLE: gl.constexpr, S: gl.constexpr, M: gl.constexpr,
                    STAGES: gl.constexpr, EARLY: gl.constexpr):
    """The product of M rows after M rows with a vector, of one stream or the sum of two; S warps share each row.

    Codes and scales are tuples: of one matrix, or of several whose rows follow one another; all but the first begin at
    `starts`, multiples of M. The vector may be brought to a root mean square of 1 and multiplied by `norm` before it is
    rotated; `added` is added to the product. GATED: of two matrices, whose tiles are taken by turns; what is written is
    the second's product times the first's through x / (1 + exp(-x)). EARLY stages are asked for before the vector, the
    others after: what is asked for first arrives first.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    WORDS0: gl.constexpr = WIDTH0 // _codes_of(BITS0)
    STEPS0: gl.constexpr = (WORDS0 + S * ACROSS - 1) // (S * ACROSS)
    WORDS1: gl.constexpr = WIDTH1 // _codes_of(BITS1) if BITS1 else 0
    STEPS1: gl.constexpr = (WORDS1 + S * ACROSS - 1) // (S * ACROSS)
    RUN: gl.constexpr = _run(STEPS0, STEPS1, STAGES)
    WAITS: gl.constexpr = _under_way(STEPS0, STEPS1, STAGES)
    ring0 = _ring(BITS0, S, M, STAGES)
    ring1 = _ring(BITS1, S, M, STAGES) if BITS1 else ring0
    row = gl.program_id(0) * M
    ASKED: gl.constexpr = (EARLY + RUN - 1) // RUN * RUN
    _fill(ring0, codes0, ring1, codes1, starts, row, rows, 0, ASKED, RUN, BITS0, WORDS0, STEPS0, BITS1, WORDS1, STEPS1,
          GATED, WHOLE, S, M)
    low0, units0, tables0 = load_levels(table0, BITS0, FORM0, MIRRORED)
    if BITS1:
        low1, units1, tables1 = load_levels(table1, BITS1, FORM1, MIRRORED)
    ready, numbers0, numbers1, signs = arrive(x0, signs0, x1, signs1, norm, WIDTH0, BITS0, FORM0, STEPS0, TOGETHER0,
                                              WIDTH1, BITS1, FORM1, STEPS1, TOGETHER1, ROTATED, NORMED, S)
    _fill(ring0, codes0, ring1, codes1, starts, row, rows, ASKED, STAGES, RUN, BITS0, WORDS0, STEPS0, BITS1, WORDS1,
          STEPS1, GATED, WHOLE, S, M)
    near0, near1 = digest(ready, x0, numbers0, x1, numbers1, signs, eps, WIDTH0, BITS0, FORM0, STEPS0, TOGETHER0,
                          WIDTH1, BITS1, FORM1, STEPS1, TOGETHER1, BYTES, ROTATED, NORMED, S)
    digits0, unit0, sum0 = near0
    digits1, unit1, sum1 = near1
    offset = low0 * sum0 + low1 * sum1 if BITS1 else low0 * sum0
    m = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma)))
    stage0, stage1 = 0, 0
    for start in range(row, rows, gl.num_programs(0) * M):
        scale = _scale(scales, starts, start, m, rows, scale_step)
        if ADDS:
            other = gl.load(added + ready + start + m, start + m < rows, other=0.0).to(gl.float32)
        total, stage0 = _stream(ring0, digits0, stage0, codes0, starts, units0, tables0, start, rows, BITS0, FORM0,
                                BYTES, WORDS0, STEPS0, TOGETHER0, GATED, 0, WHOLE, S, M, STAGES, WAITS)
        if BITS1:
            other_total, stage1 = _stream(ring1, digits1, stage1, codes1, starts, units1, tables1, start, rows, BITS1,
                                          FORM1, BYTES, WORDS1, STEPS1, TOGETHER1, False, 0, WHOLE, S, M, STAGES, WAITS)
            y = _summed(total * unit0 + other_total * unit1, offset, scale)
        else:
            y = _summed(total * unit0, offset, scale)
        if GATED:
            scale = _scale(scales, starts, start + rows, m, 2 * rows, scale_step)
            total, stage0 = _stream(ring0, digits0, stage0, codes0, starts, units0, tables0, start, rows, BITS0, FORM0,
                                    BYTES, WORDS0, STEPS0, TOGETHER0, GATED, 1, WHOLE, S, M, STAGES, WAITS)
            y = y / (1.0 + gl.exp(-y)) * _summed(total * unit0, offset, scale)
        y = y + other if ADDS else y
        gl.store(out + start + m, y.to(out.dtype.element_ty), start + m < rows)
