"""How one vector reaches the programs of `multiply_vector`: waited for, normed, rotated, as digits in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.codebook_linear import shapes
from tersor.ops.codebook_linear.kernels.digits import parts_of
from tersor.ops.codebook_linear.kernels.planes import (
    BLOCK,
    PLANES,
    groups_of,
    in_planes,
    near_words,
    plane_words,
    store_planes,
)

ACROSS = gl.constexpr(shapes.one.ACROSS)
DIGITS = gl.constexpr(4)  # columns of digits: three, and one that is not looked at
HELD = gl.constexpr(shapes.one.HELD)
MAGIC = gl.constexpr(12582912.0)  # 1.5 2^23: added to a number below 2^22, it leaves its integer in the last bits


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


@gluon.constexpr_function
def taken(bits: int, form: str) -> int:
    """Return the numbers that a lane brings at a time: those that a word of codes, or of each plane, meets."""
    return BLOCK if in_planes(bits, form) else 4 * parts_of(bits)


@gluon.jit
def _numbers(x, chunk, WIDTH: gl.constexpr, EACH: gl.constexpr, WORDS: gl.constexpr, S: gl.constexpr):
    # [words of a chunk, EACH numbers that a word meets], each word's in one lane
    flat: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [S, 1], [1, 0])
    word = chunk * WORDS + gl.arange(0, WORDS, layout=gl.SliceLayout(1, flat))[:, None]
    k = word * EACH + gl.arange(0, EACH, layout=gl.SliceLayout(0, flat))[None, :]
    return gl.load(x + k, k < WIDTH, other=0.0).to(gl.float32)


@gluon.jit
def _store(near, numbers, inverse, BITS: gl.constexpr, S: gl.constexpr, WHOLE: gl.constexpr):
    # three signed digits of each number to shared memory, of all steps or of one
    PARTS: gl.constexpr = parts_of(BITS)
    WORDS: gl.constexpr = numbers.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, PARTS, 4], [32, 1, 1], [S, 1, 1], [2, 1, 0])
    scaled = numbers * inverse + MAGIC
    four = scaled.reshape([WORDS, PARTS, 4]) if BITS == 4 else scaled.reshape([WORDS, 4, PARTS]).permute([0, 2, 1])
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
        every = every.reshape(
            [WORDS // (S * ACROSS), S, 2, ACROSS // 2, PARTS, 4, DIGITS]).permute([0, 4, 1, 6, 3, 2, 5])
        near.store(every.reshape([WORDS // (S * ACROSS), PARTS, S, DIGITS, 4 * ACROSS]))
    else:
        every = every.reshape([S, 2, ACROSS // 2, PARTS, 4, DIGITS]).permute([3, 0, 5, 2, 1, 4])
        near.store(every.reshape([PARTS, S, DIGITS, 4 * ACROSS]))


@gluon.constexpr_function
def _places(bits: int, form: str, count: int) -> int:
    """Return the binary places of a number's largest integer: 15 where it is of two bytes, with its sign, else 22."""
    return 15 if count == 2 and in_planes(bits, form) else 22


@gluon.jit
def _unit(peak, PLACES: gl.constexpr):
    # powers of two: what brings the largest magnitude, rounded too, to [2^(PLACES - 1), 2^PLACES), and back
    raised = peak * (1.0 + 2.0**-14) if PLACES == 15 else peak
    exponent = ((raised.to(gl.int32, bitcast=True) >> 23) & 255) - 126
    exponent = gl.minimum(gl.maximum(exponent, -99), 128)
    inverse = ((127 + PLACES - exponent) << 23).to(gl.float32, bitcast=True)
    return inverse, ((127 - PLACES + exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _larger_and_sum(most, total, more, extra):
    return gl.maximum(most, more), total + extra


@gluon.jit
def _larger_and_sums(most, total, power, more, extra, also):
    return gl.maximum(most, more), total + extra, power + also


@gluon.jit
def _larger_and_sum_twice(most, total, also, further, more, extra, larger, rest):
    return gl.maximum(most, more), total + extra, gl.maximum(also, larger), further + rest


@gluon.jit
def _room(BITS: gl.constexpr, FORM: gl.constexpr, BYTES: gl.constexpr, STEPS: gl.constexpr, TOGETHER: gl.constexpr,
          S: gl.constexpr, WHOLE: gl.constexpr):
    # shared memory for the digits, to be written as a whole or step by step, or for planes of steps together
    if in_planes(BITS, FORM):
        WORDS: gl.constexpr = near_words(BITS)
        GROUPS: gl.constexpr = (STEPS + TOGETHER - 1) // TOGETHER * groups_of(BITS, BYTES)
        layout: gl.constexpr = gl.SwizzledSharedLayout(WORDS // 2, 1, WORDS // 16, [3, 2, 1, 0])
        return gl.allocate_shared_memory(gl.int32, [GROUPS, TOGETHER, S, PLANES, WORDS], layout)
    else:
        layout: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [4, 3, 2, 1, 0] if WHOLE else [3, 2, 1, 0])
        return gl.allocate_shared_memory(gl.int8, [STEPS, parts_of(BITS), S, DIGITS, 4 * ACROSS], layout)


@gluon.jit
def _seen(near, BITS: gl.constexpr, FORM: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr):
    # the digits as they are read, a part of a step after the other; or the planes of a group and a step
    gl.thread_barrier()
    if in_planes(BITS, FORM):
        WORDS: gl.constexpr = near_words(BITS)
        layout: gl.constexpr = gl.SwizzledSharedLayout(WORDS // 2, 1, WORDS // 16, [2, 1, 0])
        return near._reinterpret(gl.int32, [near.shape[0] * near.shape[1], S, PLANES, WORDS], layout)
    else:
        layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 2, [2, 1, 0])
        return near._reinterpret(gl.int32, [STEPS * parts_of(BITS), S, DIGITS, ACROSS], layout)


@gluon.constexpr_function
def _chunks(steps: int, together: int) -> int:
    """Return how many times each lane brings a word's numbers."""
    return -(-steps // together)


@gluon.constexpr_function
def _words(bits: int, form: str, together: int, warps: int) -> int:
    """Return the words whose numbers are brought at a time: those of so many steps."""
    return together * warps * (plane_words(bits) if in_planes(bits, form) else ACROSS)


@gluon.jit
def _ask(x, WIDTH: gl.constexpr, BITS: gl.constexpr, FORM: gl.constexpr, STEPS: gl.constexpr, TOGETHER: gl.constexpr,
         S: gl.constexpr):
    # all numbers, a chunk after the other, where lanes can hold them
    held = ()
    if _chunks(STEPS, TOGETHER) * taken(BITS, FORM) <= HELD:
        for chunk in gl.static_range(_chunks(STEPS, TOGETHER)):
            held = held + (_numbers(x, chunk, WIDTH, taken(BITS, FORM), _words(BITS, FORM, TOGETHER, S), S),)
    return held


@gluon.jit
def _bring(x, held, WIDTH: gl.constexpr, BITS: gl.constexpr, FORM: gl.constexpr, BYTES: gl.constexpr,
           STEPS: gl.constexpr, TOGETHER: gl.constexpr, S: gl.constexpr):
    # the digits of all numbers in shared memory; (digits, the value of their unit, the sum of the numbers)
    EACH: gl.constexpr = taken(BITS, FORM)
    WORDS: gl.constexpr = _words(BITS, FORM, TOGETHER, S)
    near = _room(BITS, FORM, BYTES, STEPS, TOGETHER, S, False)
    flat: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [S, 1], [1, 0])
    most = gl.zeros([WORDS, EACH], gl.float32, flat)
    total = most
    for chunk in gl.static_range(_chunks(STEPS, TOGETHER)):
        numbers = held[chunk] if len(held) else _numbers(x, chunk, WIDTH, EACH, WORDS, S)
        most = gl.maximum(most, gl.abs(numbers))
        total += numbers
    most, total = gl.reduce((most.reshape([WORDS * EACH]), total.reshape([WORDS * EACH])), 0, _larger_and_sum)
    inverse, unit = _unit(most, _places(BITS, FORM, BYTES))
    for chunk in gl.static_range(_chunks(STEPS, TOGETHER)):
        numbers = held[chunk] if len(held) else _numbers(x, chunk, WIDTH, EACH, WORDS, S)
        if in_planes(BITS, FORM):
            store_planes(near, chunk * groups_of(BITS, BYTES), numbers * inverse + MAGIC, BITS, BYTES)
        else:
            _store(near.index(chunk), numbers, inverse, BITS, S, False)
    return _seen(near, BITS, FORM, STEPS, S), unit + (total - total), total  # NaN, where a number is not finite


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
def _by_lane(v, S: gl.constexpr):
    # [lanes, numbers of a lane]
    return v.reshape([32 * S, v.shape[0] // (32 * S)])


@gluon.jit
def _keep(v, most, total, size, WIDTH: gl.constexpr, BITS: gl.constexpr, FORM: gl.constexpr, BYTES: gl.constexpr,
          STEPS: gl.constexpr, S: gl.constexpr):
    # as _bring, of numbers in registers whose largest and sum are known; all of them times `size`
    EACH: gl.constexpr = taken(BITS, FORM)
    flat: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [S, 1], [1, 0])
    near = _room(BITS, FORM, BYTES, STEPS, STEPS, S, True)
    inverse, unit = _unit(most, _places(BITS, FORM, BYTES))
    numbers = gl.convert_layout(v.reshape([WIDTH // EACH, EACH]), flat)
    if in_planes(BITS, FORM):
        store_planes(near, 0, numbers * inverse + MAGIC, BITS, BYTES)
    else:
        _store(near, numbers, inverse, BITS, S, True)
    return _seen(near, BITS, FORM, STEPS, S), unit * size + (total - total), total * size


@gluon.jit
def _bring_rotated(before, signs, eps, WIDTH: gl.constexpr, BITS: gl.constexpr, FORM: gl.constexpr, BYTES: gl.constexpr,
                   NORMED: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr):
    # the vector rotated, and over its root mean square
    v = _rotated(before * signs[0], WIDTH, S)
    if NORMED:
        power = gl.sum(_by_lane(before * before, S), 1)
        most, total = gl.reduce((_by_lane(gl.abs(v), S), _by_lane(v, S)), 1, _larger_and_sum)
        most, total, power = gl.reduce((most, total, power), 0, _larger_and_sums)
        size = WIDTH**-0.5 * gl.rsqrt(power / WIDTH + eps)
    else:
        most, total = gl.reduce((gl.abs(v), v), 0, _larger_and_sum)
        size = WIDTH**-0.5
    return _keep(v, most, total, size, WIDTH, BITS, FORM, BYTES, STEPS, S)


@gluon.jit
def _bring_rotated_twice(before, signs, WIDTH: gl.constexpr, BITS0: gl.constexpr, FORM0: gl.constexpr,
                         STEPS0: gl.constexpr, BITS1: gl.constexpr, FORM1: gl.constexpr, STEPS1: gl.constexpr,
                         BYTES: gl.constexpr, S: gl.constexpr):
    # the vector rotated once, and once more; one reduction for both, for all warps wait for it
    v = _rotated(before * signs[0], WIDTH, S)
    w = _rotated(v * signs[1], WIDTH, S)
    most, total, also, further = gl.reduce((gl.abs(v), v, gl.abs(w), w), 0, _larger_and_sum_twice)
    first = _keep(v, most, total, WIDTH**-0.5, WIDTH, BITS0, FORM0, BYTES, STEPS0, S)
    return first, _keep(w, also, further, WIDTH**-0.5, WIDTH, BITS1, FORM1, BYTES, STEPS1, S)


@gluon.jit
def arrive(x0, signs0, x1, signs1, norm, WIDTH0: gl.constexpr, BITS0: gl.constexpr, FORM0: gl.constexpr,
           STEPS0: gl.constexpr, TOGETHER0: gl.constexpr, WIDTH1: gl.constexpr, BITS1: gl.constexpr,
           FORM1: gl.constexpr, STEPS1: gl.constexpr, TOGETHER1: gl.constexpr, ROTATED: gl.constexpr,
           NORMED: gl.constexpr, S: gl.constexpr):
    """Wait for the vectors; return 0, their numbers as far as lanes hold them, and the signs that they meet.

    The 0 is known only after the wait: what the kernel before wrote is read at places to which it was added.
    """
    flat: gl.constexpr = gl.BlockedLayout([WIDTH0 // (32 * S)], [32], [S], [0]) if ROTATED else 0
    signs = ()
    if ROTATED:
        k = gl.arange(0, WIDTH0, layout=flat)
        turn = gl.load(signs0 + k).to(gl.float32)
        signs = signs + ((turn * gl.load(norm + k).to(gl.float32)) if NORMED else turn,)
        if BITS1:
            signs = signs + (gl.load(signs1 + k).to(gl.float32) * WIDTH0**-0.5,)
    # codes are older than the kernel before this one; what that one writes is only read from here on
    ready = 16 * gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32,
        is_pure=False, pack=1)
    if ROTATED:
        first = (gl.load(x0 + ready + k).to(gl.float32),)
        second = first
    else:
        first = _ask(x0 + ready, WIDTH0, BITS0, FORM0, STEPS0, TOGETHER0, S)
        second = _ask(x1 + ready, WIDTH1, BITS1, FORM1, STEPS1, TOGETHER1, S) if BITS1 else first
    return ready, first, second, signs


@gluon.jit
def digest(ready, x0, numbers0, x1, numbers1, signs, eps, WIDTH0: gl.constexpr, BITS0: gl.constexpr,
           FORM0: gl.constexpr, STEPS0: gl.constexpr, TOGETHER0: gl.constexpr, WIDTH1: gl.constexpr,
           BITS1: gl.constexpr, FORM1: gl.constexpr, STEPS1: gl.constexpr, TOGETHER1: gl.constexpr, BYTES: gl.constexpr,
           ROTATED: gl.constexpr, NORMED: gl.constexpr, S: gl.constexpr):
    """Return of each stream (digits or planes in shared memory, the value of their unit, the sum of the numbers)."""
    if ROTATED and BITS1:
        return _bring_rotated_twice(numbers0[0], signs, WIDTH0, BITS0, FORM0, STEPS0, BITS1, FORM1, STEPS1, BYTES, S)
    elif ROTATED:
        first = _bring_rotated(numbers0[0], signs, eps, WIDTH0, BITS0, FORM0, BYTES, NORMED, STEPS0, S)
        return first, first
    else:
        first = _bring(x0 + ready, numbers0, WIDTH0, BITS0, FORM0, BYTES, STEPS0, TOGETHER0, S)
        second = first
        if BITS1:
            second = _bring(x1 + ready, numbers1, WIDTH1, BITS1, FORM1, BYTES, STEPS1, TOGETHER1, S)
        return first, second
