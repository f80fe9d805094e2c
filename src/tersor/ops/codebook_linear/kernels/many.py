"""The kernel of `codebook_linear` for 9 to 64 vectors: codes and vectors reach shared memory together, once a program.

A step of a program is one tile of codes for each of its warps and the vectors that this tile meets. `sum_parts` adds
what programs that share rows wrote. See README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from tersor.ops.codebook_linear.kernels.fragments import (
    field_shift,
    four_bits,
    four_signed_bits,
    halves,
    keep_field,
    load_table,
    load_zeros,
    registers,
    shift_down,
    take_fragments,
    three_bits,
    two_bits,
)
from tersor.ops.codebook_linear.shapes.limits import TILE
from tersor.ops.dispatch import kernel

WIDE = gl.constexpr(TILE)
RUN = gl.constexpr(4)  # neighbouring elements of a lane: 16 bytes of shared memory


@gluon.constexpr_function
def _pairs(bits: int) -> int:
    """Return the pairs of parts of an element."""
    return 16 if bits == 3 else 16 // bits


@gluon.constexpr_function
def _vector_layout(share: int, groups: int, columns: int):
    """Return the layout of a step's copy of the vectors [pairs, share, columns, 16]: 8 columns a warp, then pairs."""
    across = min(groups, columns // 8)
    return gl.BlockedLayout([1, 1, 1, 4], [1, 1, 8, 4], [groups // across, share, across, 1], [3, 2, 1, 0])


@gluon.jit
def _code_words(row, rows, BITS: gl.constexpr, ELEMENTS: gl.constexpr, COPY: gl.constexpr, S: gl.constexpr,
                R: gl.constexpr, M: gl.constexpr):
    # which words of M rows a step copies, from the first of the step; and which elements those are
    layout: gl.constexpr = gl.BlockedLayout([1, 1, COPY], [1, 2 * COPY, 16 // COPY], [S, R, 1], [2, 1, 0])
    m = gl.minimum(gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout))), rows - 1 - row)[None, :, None]
    share = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    place = share * WIDE + gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    if BITS == 3:
        return m * (3 * ELEMENTS) + ((place // 2) * 6 + place % 2), place + m * 0
    else:
        return m * ELEMENTS + place, place + m * 0


@gluon.jit
def _fetch_codes(ring, stage, codes, words, place, step, end, BITS: gl.constexpr, ELEMENTS: gl.constexpr,
                 PADDED: gl.constexpr, S: gl.constexpr):
    # start to copy a tile of each row for each of S shares
    words += step * ((3 if BITS == 3 else 1) * S * WIDE)  # 32 bits: places of a program's rows take a register each
    inside = step < end
    if ELEMENTS != PADDED:  # the last step has no more than it needs
        inside = inside & (step * (S * WIDE) + place < ELEMENTS)
    if BITS == 3:
        for part in gl.static_range(3):
            async_copy.async_copy_global_to_shared(ring.index(stage * 3 + part), codes + 2 * part + words, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(ring.index(stage), codes + words, mask=inside)


@gluon.jit
def _vector_words(batch, column_step, part_step, PAIRS: gl.constexpr, S: gl.constexpr, R: gl.constexpr,
                  N: gl.constexpr):
    # which words of the vectors a step copies, from the first of the step; the last vector stands for columns beyond
    deep: gl.constexpr = _vector_layout(S, R, N)
    outer: gl.constexpr = gl.SliceLayout(3, deep)
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(1, gl.SliceLayout(2, outer)))[:, None, None, None]
    share = gl.arange(0, S, layout=gl.SliceLayout(0, gl.SliceLayout(2, outer)))[None, :, None, None]
    column = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, outer)))[None, None, :, None]
    inner: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, deep)))
    word = gl.arange(0, WIDE, layout=inner)[None, None, None, :]
    return pair * part_step + gl.minimum(column, batch - 1) * column_step + (share * WIDE + word)


@gluon.jit
def _fetch_vectors(ring, stage, xp, words, step, end, S: gl.constexpr):
    # start to copy what the tiles of a step meet, of all vectors
    async_copy.async_copy_global_to_shared(ring.index(stage), xp + (words + step * (S * WIDE)), mask=step < end)


@gluon.jit
def _operands(near, index, lb: gl.constexpr):
    # two parts of the vectors: a lane's four words are two registers of each, neighbours, as the tensor cores take them
    words = near.index(index).permute((0, 2, 1)).load(lb)
    return gl.inline_asm_elementwise("mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
                                     "=r,=r,=r,=r,r,r,r,r", [words], dtype=halves(2), is_pure=True, pack=4)


@gluon.jit
def _products(acc, parts, near, index, lb: gl.constexpr):
    for pair in gl.static_range(len(parts) // 2):
        b0, b1 = _operands(near, index + pair, lb)
        acc = mma_v2(parts[2 * pair], b0, acc)
        acc = mma_v2(parts[2 * pair + 1], b1, acc)
    return acc


@gluon.jit
def _field_products(acc, word, near, index, BITS: gl.constexpr, lb: gl.constexpr):
    # a code is a subnormal number as it stands: there is no exponent to set
    SHIFT: gl.constexpr = field_shift(BITS)
    HALF: gl.constexpr = 16 // BITS
    shifted = gl.inline_asm_elementwise(shift_down(SHIFT), "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    for pair in gl.static_range(HALF):
        b0, b1 = _operands(near, index + pair, lb)
        for side in gl.static_range(2):
            source = word if (2 * pair + side) % HALF * BITS < SHIFT else shifted
            a = gl.inline_asm_elementwise(keep_field(2 * pair // HALF, (2 * pair + side) % HALF * BITS, BITS, SHIFT),
                                          "=r,r,r", [source], dtype=gl.float16, is_pure=True, pack=2)
            acc = mma_v2(a, b0 if side == 0 else b1, acc)
    return acc


@gluon.jit
def _multiply(acc, words, near, index, lut, table, BITS: gl.constexpr, FORM: gl.constexpr, lb: gl.constexpr):
    # `acc` and the products of a tile; one sum is enough, for a warp has many tiles of 16 rows by 8 columns
    first, second, third = words
    if FORM == "affine":
        acc = _field_products(acc, first, near, index, BITS, lb)
    elif BITS == 2:
        for word in gl.static_range(2):
            parts = gl.inline_asm_elementwise(two_bits(word), registers(8, 6), [first, lut[0], lut[4]],
                                              dtype=halves(8), is_pure=True, pack=2)
            acc = _products(acc, parts, near, index + 4 * word, lb)
    elif BITS == 3:
        for block in gl.static_range(4):
            parts = gl.inline_asm_elementwise(three_bits(block), registers(8, 14),
                                              [first, second, third, lut[0], lut[1], lut[4], lut[5]], dtype=halves(8),
                                              is_pure=True, pack=2)
            acc = _products(acc, parts, near, index + 4 * block, lb)
    elif BITS == 4 and FORM == "symmetric":
        for word in gl.static_range(2):
            parts = gl.inline_asm_elementwise(four_signed_bits(word), registers(4, 10),
                                              [first, lut[2], lut[3], lut[6], lut[7]], dtype=halves(4), is_pure=True,
                                              pack=2)
            acc = _products(acc, parts, near, index + 2 * word, lb)
    elif BITS == 4:
        for word in gl.static_range(2):
            parts = gl.inline_asm_elementwise(
                four_bits(word), registers(4, 18),
                [first, lut[0], lut[1], lut[2], lut[3], lut[4], lut[5], lut[6], lut[7]], dtype=halves(4), is_pure=True,
                pack=2)
            acc = _products(acc, parts, near, index + 2 * word, lb)
    else:
        parts = (gl.load(table + (first & 255)), gl.load(table + (first >> 8 & 255)),
                 gl.load(table + (first >> 16 & 255)), gl.load(table + (first >> 24 & 255)))
        acc = _products(acc, parts, near, index, lb)
    return acc


@gluon.jit
def _group_terms(scales, zeros, sums, row, rows, batch, groups, tile, mma: gl.constexpr, BITS: gl.constexpr,
                 TILES: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, SUMMED: gl.constexpr,
                 S: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    # scales and zero points of the tiles that begin with number `tile`, and the sums of the numbers that they meet
    m = gl.minimum(row + gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma))), rows - 1)[None, :, None]
    share = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    place = m * groups + gl.minimum((tile + share) * WIDE // GROUP, groups - 1)
    scale = gl.load(scales + place).to(gl.float32)
    zero, size = scale, scale
    if SUMMED:
        size = gl.load(sums + n * TILES + tile + share, n < batch, other=0.0)
    if ZEROS:
        zero = load_zeros(zeros, place, BITS)
    return scale, zero, size


@gluon.jit
def _rooms(BITS: gl.constexpr, S: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    # shared memory for codes and for vectors, the latter by stages to write to and by pairs of parts to read from
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    deep: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    ring = gl.allocate_shared_memory(gl.int32, [3 * STAGES if BITS == 3 else STAGES, S, M, WIDE], flat)
    vectors = gl.allocate_shared_memory(gl.int32, [STAGES, _pairs(BITS), S, N, WIDE], deep)
    return ring, vectors, vectors._reinterpret(gl.int32, [STAGES * _pairs(BITS), S, N, WIDE], flat)


@kernel
@gluon.jit
def multiply_columns(codes, xp, lut, table, peaks, totals, sums, scales, zeros, out, rows, batch, groups, scale_step,
                     column_step, part_step, BITS: gl.constexpr, ELEMENTS: gl.constexpr, COPY: gl.constexpr,
                     PADDED: gl.constexpr, FORM: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
                     S: gl.constexpr, R: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr,
                     STAGES: gl.constexpr):
    """Products of M rows with N vectors over one of SPLIT parts of the steps; R groups of S warps take rows apart."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, R, 1], [1, 16, 8])
    la: gl.constexpr = gl.DotOperandLayout(0, mma, RUN)
    lb: gl.constexpr = gl.DotOperandLayout(1, mma, RUN)
    STEPS: gl.constexpr = PADDED // (S * WIDE)
    PAIRS: gl.constexpr = _pairs(BITS)
    row = gl.program_id(0) * M
    begin = gl.program_id(1) * ((STEPS + SPLIT - 1) // SPLIT)
    end = gl.minimum(begin + (STEPS + SPLIT - 1) // SPLIT, STEPS)
    ring, vectors, near = _rooms(BITS, S, M, N, STAGES)
    codes += row.to(gl.int64) * (3 * ELEMENTS if BITS == 3 else ELEMENTS)
    own, place = _code_words(row, rows, BITS, ELEMENTS, COPY, S, R, M)
    theirs = _vector_words(batch, column_step, part_step, PAIRS, S, R, N)
    for step in gl.static_range(STAGES - 1):
        _fetch_codes(ring, step, codes, own, place, begin + step, end, BITS, ELEMENTS, PADDED, S)
    # codes are older than the kernel before this one; what that one writes is only read from here on
    ready = 16 * gl.inline_asm_elementwise("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;",
                                           "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    xp += ready
    for step in gl.static_range(STAGES - 1):
        _fetch_vectors(vectors, step, xp, theirs, begin + step, end, S)
        async_copy.commit_group()
    # zero, for a batch is small, but maybe each lane's own: else `prmt` copies words from uniform registers each step
    lanes = gl.inline_asm_elementwise("{ .reg .b32 t; mov.u32 t, %laneid; mul.lo.u32 $0, t, $1; }", "=r,r",
                                      [batch >> 20], dtype=gl.int32, is_pure=True, pack=1)
    lut = load_table(table, lut + ready + lanes, BITS, FORM, False)
    acc = gl.zeros([S, M, N], gl.float32, mma)
    stage = 0
    free = STAGES - 1
    for step in range(begin, end):
        if GROUP:
            scale, zero, size = _group_terms(
                scales, zeros, sums + ready, row, rows, batch, groups, step * S, mma, BITS, PADDED // WIDE, GROUP,
                ZEROS, ZEROS or FORM == "affine", S, M, N)
        async_copy.wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        _fetch_codes(ring, free, codes, own, place, ahead, end, BITS, ELEMENTS, PADDED, S)
        _fetch_vectors(vectors, free, xp, theirs, ahead, end, S)
        async_copy.commit_group()
        words = take_fragments(ring, stage, la, BITS)
        if GROUP:
            none = gl.zeros([S, M, N], gl.float32, mma)
            part = _multiply(none, words, near, stage * PAIRS, lut, table, BITS, FORM, lb)
            if FORM == "affine":
                part = part * lut[1] + lut[0] * size
            if ZEROS:
                part -= zero * size
            acc += part * scale
        else:
            acc = _multiply(acc, words, near, stage * PAIRS, lut, table, BITS, FORM, lb)
        free = stage
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    async_copy.wait_group(0)  # copies of nothing write zeros, and the sum over the shares takes the same memory
    _finish(acc, lut, peaks + ready, totals + ready, scales, out, row, rows, batch, scale_step, mma, FORM, GROUP, S, M,
            N)


@gluon.jit
def _finish(acc, lut, peaks, totals, scales, out, row, rows, batch, scale_step, mma: gl.constexpr, FORM: gl.constexpr,
            GROUP: gl.constexpr, S: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    # add up the shares and write a program's part: (parts, batch, rows)
    n3 = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    if FORM == "affine" and not GROUP:
        # the sums of the numbers go to one share of one part alone
        share = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
        once = (share + gl.program_id(1) == 0) & (n3 < batch)
        acc = acc * lut[1] + lut[0] * gl.load(totals + n3, once, other=0.0)
    acc *= gl.load(peaks + n3, n3 < batch, other=0.0)
    y = gl.sum(acc, 0)
    place = row + gl.arange(0, M, layout=gl.SliceLayout(1, gl.SliceLayout(0, mma)))[:, None]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(0, mma)))[None, :]
    if not GROUP:
        y *= gl.load(scales + place * scale_step, place < rows, other=0.0).to(gl.float32)
    line = (gl.program_id(1) * batch + n).to(gl.int64) * rows
    gl.store(out + line + place, y.to(out.dtype.element_ty), (place < rows) & (n < batch))


@kernel
@triton.jit
def sum_parts(parts, out, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of PARTS arrays of `count` numbers each, in their order."""
    tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.load(parts + place, inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * count + place, inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)
