"""The kernel of `codebook_linear` for one vector: exact integer products with three 8-bit digits of its numbers.

A program keeps the digits in shared memory and walks over its rows; codes reach shared memory ahead of it. See README.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tersor.ops.codebook_linear import shapes
from tersor.ops.codebook_linear.digits import load_levels, multiply_digits, parts_of, sums_of, weigh

ACROSS = gl.constexpr(shapes.ACROSS)
DIGITS = gl.constexpr(4)  # columns of digits: three, and one that is not looked at
HELD = gl.constexpr(shapes.HELD)
MAGIC = gl.constexpr(12582912.0)  # 1.5 2^23: added to a number below 2^22, it leaves the nearest integer in the last bits


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
def _order(width: int, factor: int) -> int:
    """Return the order of one of three Sylvester matrices whose product is of order `width`."""
    bits = width.bit_length() - 1
    return 1 << ((bits + factor) // 3)


@gluon.constexpr_function
def _butterflies(order: int) -> str:
    """Return PTX: the Hadamard transform of $order … to $0 …."""
    names = [f"${order + place}" for place in range(order)]
    lines, level, step = [], 0, 1
    while step < order:
        last = 2 * step == order
        fresh = [f"${place}" if last else f"l{level}_{place}" for place in range(order)]
        if not last:
            lines.append(f".reg .f32 {', '.join(fresh)};")
        for place in range(order):
            if place & step == 0:
                one, other = names[place], names[place + step]
                lines += [f"add.f32 {fresh[place]}, {one}, {other};", f"sub.f32 {fresh[place + step]}, {one}, {other};"]
        names, level, step = fresh, level + 1, 2 * step
    return "\n".join(["{", *lines, "}"])


@gluon.constexpr_function
def _floats(order: int) -> str:
    """Return the constraints of `_butterflies`."""
    return ",".join(["=&f"] * order + ["f"] * order)


@gluon.jit
def _fetch(ring, stage, codes, row, rows, step, wanted, BITS: gl.constexpr, WORDS: gl.constexpr, WHOLE: gl.constexpr,
           S: gl.constexpr, M: gl.constexpr):
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
    start = codes + row.to(gl.int64) * (TIMES * WORDS) + step * (S * ACROSS * TIMES)
    if BITS == 3:  # a lane's places are twelve words, its first four, second and third
        words = start + (m[None, :, None] * (3 * WORDS) + place // 4 * 12 + place % 4)
        for part in gl.static_range(3):
            async_copy.async_copy_global_to_shared(ring.index(stage * 3 + part), words + 4 * part, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(ring.index(stage), start + (m[None, :, None] * WORDS + place), mask=inside)
    async_copy.commit_group()


@gluon.jit
def _begin(codes, row, rows, BITS: gl.constexpr, WORDS: gl.constexpr, STEPS: gl.constexpr, WHOLE: gl.constexpr,
           S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    # a ring in shared memory, and the first copies to it
    layout: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [2, 1, 0])
    ring = gl.allocate_shared_memory(gl.int32, [3 * STAGES if BITS == 3 else STAGES, S, M, ACROSS], layout)
    for step in gl.static_range(STAGES):
        at = row + step // STEPS * gl.num_programs(0) * M
        _fetch(ring, step, codes, at, rows, step % STEPS, at < rows, BITS, WORDS, WHOLE, S, M)
    return ring


@gluon.jit
def _take(ring, stage, layout: gl.constexpr, BITS: gl.constexpr):
    # a stage's words as fragments
    if BITS == 3:
        return ring.index(stage * 3).load(layout), ring.index(stage * 3 + 1).load(layout), ring.index(stage * 3 + 2).load(layout)
    else:
        return (ring.index(stage).load(layout),)


@gluon.jit
def _numbers(x, step, WIDTH: gl.constexpr, BITS: gl.constexpr, FORM: gl.constexpr, S: gl.constexpr):
    # [words of a step, numbers that the codes of a word meet], each word's in one lane
    EACH: gl.constexpr = 4 * parts_of(BITS)
    flat: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [S, 1], [1, 0])
    word = step * (S * ACROSS) + gl.arange(0, S * ACROSS, layout=gl.SliceLayout(1, flat))[:, None]
    number = gl.arange(0, EACH, layout=gl.SliceLayout(0, flat))[None, :]
    k = word // 4 * 128 + number // 4 * 16 + word % 4 * 4 + number % 4 if BITS == 3 else word * EACH + number
    return gl.load(x + k, k < WIDTH, other=0.0).to(gl.float32)


@gluon.jit
def _store(near, numbers, inverse, BITS: gl.constexpr, FORM: gl.constexpr, S: gl.constexpr, WHOLE: gl.constexpr):
    # three signed digits of each number to shared memory, of all steps or of one
    PARTS: gl.constexpr = parts_of(BITS)
    WORDS: gl.constexpr = numbers.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, PARTS, 4], [32, 1, 1], [S, 1, 1], [2, 1, 0])
    scaled = numbers * inverse + MAGIC
    if BITS == 3 or (BITS == 4 and FORM != "affine"):
        four = scaled.reshape([WORDS, PARTS, 4])
    else:
        four = scaled.reshape([WORDS, 4, PARTS]).permute([0, 2, 1])
    # bytes of the integer plus 128 each, less 128 again: digits with signs
    biased = gl.convert_layout(four, layout).to(gl.int32, bitcast=True) - (0x4B400000 - 0x808080)
    zero, one, two = gl.inline_asm_elementwise(
        "{ .reg .b32 a, b, c, d; prmt.b32 a, $3, $4, 0x5140; prmt.b32 b, $5, $6, 0x5140; prmt.b32 c, a, b, 0x5410;"
        " prmt.b32 d, a, b, 0x7632; xor.b32 $0, c, 0x80808080; xor.b32 $1, d, 0x80808080;"
        " prmt.b32 a, $3, $4, 0x0062; prmt.b32 b, $5, $6, 0x0062; prmt.b32 c, a, b, 0x5410;"
        " xor.b32 $2, c, 0x80808080; }", "=&r,=&r,=&r,r,r,r,r", [biased], dtype=(gl.int8, gl.int8, gl.int8),
        is_pure=True, pack=4)
    every = gl.join(gl.join(zero, two), gl.join(one, two))
    if WHOLE:
        every = every.reshape([WORDS // (S * ACROSS), S, 2, ACROSS // 2, PARTS, 4, DIGITS]).permute([0, 4, 1, 6, 3, 2, 5])
        near.store(every.reshape([WORDS // (S * ACROSS), PARTS, S, DIGITS, 4 * ACROSS]))
    else:
        every = every.reshape([S, 2, ACROSS // 2, PARTS, 4, DIGITS]).permute([3, 0, 5, 2, 1, 4])
        near.store(every.reshape([PARTS, S, DIGITS, 4 * ACROSS]))


@gluon.jit
def _unit(peak):
    # powers of two: what brings the largest magnitude to [2^21, 2^22), and back
    exponent = ((peak.to(gl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = gl.minimum(gl.maximum(exponent, -100), 127)
    return ((148 - exponent) << 23).to(gl.float32, bitcast=True), ((exponent + 106) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _larger_and_sum(most, total, more, extra):
    return gl.maximum(most, more), total + extra


@gluon.jit
def _room(BITS: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr, WHOLE: gl.constexpr):
    # shared memory for the digits, to be written as a whole or step by step
    layout: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [4, 3, 2, 1, 0] if WHOLE else [3, 2, 1, 0])
    return gl.allocate_shared_memory(gl.int8, [STEPS, parts_of(BITS), S, DIGITS, 4 * ACROSS], layout)


@gluon.jit
def _seen(near, BITS: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr):
    # the digits as they are read: a part of a step after the other
    layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 2, [2, 1, 0])
    gl.thread_barrier()
    return near._reinterpret(gl.int32, [STEPS * parts_of(BITS), S, DIGITS, ACROSS], layout)


@gluon.jit
def _bring(x, WIDTH: gl.constexpr, BITS: gl.constexpr, FORM: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr):
    # the digits of all numbers in shared memory; (digits, the value of their unit, the sum of the numbers)
    near = _room(BITS, STEPS, S, False)
    EACH: gl.constexpr = 4 * parts_of(BITS)
    flat: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [S, 1], [1, 0])
    most = gl.zeros([S * ACROSS, EACH], gl.float32, flat)
    total = most
    held = ()
    for step in gl.static_range(STEPS):
        numbers = _numbers(x, step, WIDTH, BITS, FORM, S)
        most = gl.maximum(most, gl.abs(numbers))
        total += numbers
        if STEPS * EACH <= HELD:
            held = held + (numbers,)
    most, total = gl.reduce((most.reshape([S * ACROSS * EACH]), total.reshape([S * ACROSS * EACH])), 0, _larger_and_sum)
    inverse, unit = _unit(most)
    for step in gl.static_range(STEPS):
        numbers = held[step] if STEPS * EACH <= HELD else _numbers(x, step, WIDTH, BITS, FORM, S)
        _store(near.index(step), numbers, inverse, BITS, FORM, S, False)
    return _seen(near, BITS, STEPS, S), unit + (total - total), total  # NaN, where a number is not finite


@gluon.jit
def _hadamard(v, ORDER: gl.constexpr, S: gl.constexpr):
    # [lines, ORDER] times Sylvester's matrix, a line in one lane
    layout: gl.constexpr = gl.BlockedLayout([1, ORDER], [32, 1], [S, 1], [1, 0])
    return gl.inline_asm_elementwise(_butterflies(ORDER), _floats(ORDER), [gl.convert_layout(v, layout)],
                                     dtype=gl.float32, is_pure=True, pack=ORDER)


@gluon.jit
def _rotated(v, WIDTH: gl.constexpr, S: gl.constexpr):
    # [WIDTH] times Sylvester's matrix, as three factors, each within a lane
    A: gl.constexpr = _order(WIDTH, 0)
    B: gl.constexpr = _order(WIDTH, 1)
    C: gl.constexpr = _order(WIDTH, 2)
    v = _hadamard(v.reshape([A * B, C]), C, S)
    v = _hadamard(v.reshape([A, B, C]).permute([0, 2, 1]).reshape([A * C, B]), B, S)
    v = _hadamard(v.reshape([A, C, B]).permute([1, 2, 0]).reshape([C * B, A]), A, S)
    v = v.reshape([C, B, A]).permute([2, 1, 0]).reshape([WIDTH])
    return gl.convert_layout(v, gl.BlockedLayout([WIDTH // (32 * S)], [32], [S], [0]))


@gluon.jit
def _bring_rotated(v, WIDTH: gl.constexpr, BITS: gl.constexpr, FORM: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr):
    # as _bring, of numbers in registers
    EACH: gl.constexpr = 4 * parts_of(BITS)
    flat: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [S, 1], [1, 0])
    near = _room(BITS, STEPS, S, True)
    most, total = gl.reduce((gl.abs(v), v), 0, _larger_and_sum)
    inverse, unit = _unit(most)
    if BITS == 3:
        v = v.reshape([WIDTH // 128, 8, 4, 4]).permute([0, 2, 1, 3])
    numbers = gl.convert_layout(v.reshape([WIDTH // EACH, EACH]), flat)
    _store(near, numbers, inverse, BITS, FORM, S, True)
    return _seen(near, BITS, STEPS, S), unit * WIDTH**-0.5 + (total - total), total * WIDTH**-0.5


@gluon.jit
def _stream(ring, digits, stage, codes, tables, row, rows, BITS: gl.constexpr, FORM: gl.constexpr,
            WORDS: gl.constexpr, STEPS: gl.constexpr, WHOLE: gl.constexpr, S: gl.constexpr, M: gl.constexpr,
            STAGES: gl.constexpr):
    # integer sums [S, M, 8] over each warp's share of M rows, whose first step is in `stage`; and the stage after them
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    sums = ()
    for _ in gl.static_range(sums_of(BITS)):
        sums = sums + (gl.zeros([S, M, 2 * DIGITS], gl.int32, mma),)
    for step in range(0, STEPS):
        async_copy.wait_group(STAGES - 1)
        words = _take(ring, stage, _dot(0, S), BITS)
        later = row + (step + STAGES) // STEPS * gl.num_programs(0) * M
        _fetch(ring, stage, codes, later, rows, (step + STAGES) % STEPS, later < rows, BITS, WORDS, WHOLE, S, M)
        sums = multiply_digits(sums, words, digits, step * parts_of(BITS), tables, _dot(1, S), _doubled(S), BITS, FORM)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    return sums, stage


@gluon.jit
def multiply_vector(x0, codes0, table0, signs0, x1, codes1, table1, signs1, scales, out, rows, scale_step,
                    WIDTH0: gl.constexpr, BITS0: gl.constexpr, FORM0: gl.constexpr, WIDTH1: gl.constexpr,
                    BITS1: gl.constexpr, FORM1: gl.constexpr, MIRRORED: gl.constexpr, ROTATED: gl.constexpr,
                    WHOLE: gl.constexpr, S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    """The product of M rows after M rows with a vector, of one stream or the sum of two; S warps share each row."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    WORDS0: gl.constexpr = WIDTH0 // (4 * parts_of(BITS0))
    STEPS0: gl.constexpr = (WORDS0 + S * ACROSS - 1) // (S * ACROSS)
    row = gl.program_id(0) * M
    ring0 = _begin(codes0, row, rows, BITS0, WORDS0, STEPS0, WHOLE, S, M, STAGES)
    low0, units0, tables0 = load_levels(table0, BITS0, FORM0, MIRRORED)
    if BITS1:
        WORDS1: gl.constexpr = WIDTH1 // (4 * parts_of(BITS1))
        STEPS1: gl.constexpr = (WORDS1 + S * ACROSS - 1) // (S * ACROSS)
        low1, units1, tables1 = load_levels(table1, BITS1, FORM1, MIRRORED)
        ring1 = _begin(codes1, row, rows, BITS1, WORDS1, STEPS1, WHOLE, S, M, STAGES)
    if ROTATED:
        flat: gl.constexpr = gl.BlockedLayout([WIDTH0 // (32 * S)], [32], [S], [0])
        k = gl.arange(0, WIDTH0, layout=flat)
        turn0 = gl.load(signs0 + k).to(gl.float32)
        if BITS1:
            turn1 = gl.load(signs1 + k).to(gl.float32) * WIDTH0**-0.5
    # codes are older than the kernel before this one; what that one writes is only read from here on
    ready = 16 * gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32,
        is_pure=False, pack=1)
    if ROTATED:
        v = _rotated(gl.load(x0 + ready + k).to(gl.float32) * turn0, WIDTH0, S)
        digits0, unit0, sum0 = _bring_rotated(v, WIDTH0, BITS0, FORM0, STEPS0, S)
    else:
        digits0, unit0, sum0 = _bring(x0 + ready, WIDTH0, BITS0, FORM0, STEPS0, S)
    offset = low0 * sum0
    if BITS1:
        if ROTATED:
            v = _rotated(v * turn1, WIDTH1, S)
            digits1, unit1, sum1 = _bring_rotated(v, WIDTH1, BITS1, FORM1, STEPS1, S)
        else:
            digits1, unit1, sum1 = _bring(x1 + ready, WIDTH1, BITS1, FORM1, STEPS1, S)
        offset += low1 * sum1
    column = gl.arange(0, 2 * DIGITS, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    digit = gl.where(column == 0, 1.0, gl.where(column == 1, 256.0, gl.where(column == 2, 65536.0, 0.0)))
    m = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma)))
    stage0 = 0
    stage1 = 0
    for start in range(row, rows, gl.num_programs(0) * M):
        scale = gl.load(scales + (start + m) * scale_step, start + m < rows, other=0.0).to(gl.float32)
        sums, stage0 = _stream(ring0, digits0, stage0, codes0, tables0, start, rows, BITS0, FORM0, WORDS0, STEPS0, WHOLE,
                               S, M, STAGES)
        total = weigh(sums, units0, BITS0) * unit0
        if BITS1:
            sums, stage1 = _stream(ring1, digits1, stage1, codes1, tables1, start, rows, BITS1, FORM1, WORDS1, STEPS1,
                                   WHOLE, S, M, STAGES)
            total += weigh(sums, units1, BITS1) * unit1
        y = gl.convert_layout(gl.sum(gl.sum(total * digit, 2), 0) + offset, m.type.layout)
        gl.store(out + start + m, (y * scale).to(out.dtype.element_ty), start + m < rows)
