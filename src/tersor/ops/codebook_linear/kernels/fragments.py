"""Packed codes to half-precision fragments of the tensor cores, in registers: what kernels of several vectors share.

A fragment register holds two fp16 numbers that meet two neighbouring rows of the other operand. Which two codes share
one is free, for the other operand is permuted to suit (`prepare` in prepared.py); so codes are never moved, only looked
up. Blocks take pairs of elements: 2 x 32 bits of a stream, 2 x 96 of 3-bit codes. README.md counts the instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.constexpr_function
def two_bits(word: int) -> str:
    """Return PTX: 16 codes of $8 or $9 through the table of bytes $10 (high) and $12 (low) to 8 registers.

    Codes 0 2 4 … 14 come first, then 1 3 … 15, for every other code already lies in a nibble of its own.
    """
    lines = ["{", ".reg .b32 even, odd, sel, hi, lo;", f"and.b32 even, ${8 + word}, 0x33333333;",
             f"shr.u32 odd, ${8 + word}, 2;", "and.b32 odd, odd, 0x33333333;"]
    for part, source in enumerate(("even", "odd")):
        for half in range(2):
            place = 4 * part + 2 * half
            lines += [f"shr.u32 sel, {source}, {16 * half};" if half else f"mov.b32 sel, {source};",
                      "prmt.b32 hi, $10, $10, sel;", "prmt.b32 lo, $12, $12, sel;",
                      f"prmt.b32 ${place}, lo, hi, 0x5140;", f"prmt.b32 ${place + 1}, lo, hi, 0x7362;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def four_bits(word: int) -> str:
    """Return PTX: 8 codes of $4 or $5 through the tables of bytes $6 $8 $10 $12 (high) and $14 $16 $18 $20 (low)."""
    lines = ["{", ".reg .b32 sel, top, s, t, a, b, hi, lo;", f"and.b32 sel, ${4 + word}, 0x77777777;",
             f"shr.u32 top, ${4 + word}, 1;",
             "and.b32 top, top, 0x44444444;", "or.b32 top, top, 0x32103210;"]
    for half in range(2):
        lines += [f"shr.u32 s, sel, {16 * half};" if half else "mov.b32 s, sel;",
                  f"shr.u32 t, top, {16 * half};" if half else "mov.b32 t, top;",
                  "prmt.b32 a, $6, $8, s;", "prmt.b32 b, $10, $12, s;", "prmt.b32 hi, a, b, t;",
                  "prmt.b32 a, $14, $16, s;", "prmt.b32 b, $18, $20, s;", "prmt.b32 lo, a, b, t;",
                  f"prmt.b32 ${2 * half}, lo, hi, 0x5140;", f"prmt.b32 ${2 * half + 1}, lo, hi, 0x7362;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def four_signed_bits(word: int) -> str:
    """Return PTX: 8 codes of $4 or $5 through bytes of eight magnitudes, $6 $8 (high) and $10 $12 (low), and a sign.

    A code of the upper half is positive and counts from the middle; of the lower half its complement does. `prmt` gives
    0xff for a nibble with its top bit set, else the byte 0x80: one bit of that is the sign.
    """
    code = f"${4 + word}"
    lines = ["{", ".reg .b32 t, index, i, r, s, hi, lo;", f"shr.u32 t, {code}, 3;", "and.b32 t, t, 0x11111111;",
             "mul.lo.u32 t, t, 7;", f"lop3.b32 index, {code}, t, 0x77777777, 0x82;"]
    for half in range(2):
        lines += [f"shr.u32 i, index, {16 * half};" if half else "mov.b32 i, index;",
                  f"shr.u32 r, {code}, {16 * half};" if half else f"mov.b32 r, {code};",
                  "prmt.b32 hi, $6, $8, i;", "prmt.b32 lo, $10, $12, i;", "prmt.b32 s, 0x80808080, 0x80808080, r;",
                  "mad.lo.u32 s, s, 2, 0;", "lop3.b32 hi, hi, s, 0x80808080, 0xd2;",
                  f"prmt.b32 ${2 * half}, lo, hi, 0x5140;", f"prmt.b32 ${2 * half + 1}, lo, hi, 0x7362;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def three_bits(block: int) -> str:
    """Return PTX: 16 codes, bits 48 `block` and on of $8 … $13, through tables $14 $16 (high) and $18 $20 (low)."""
    words = [f"${8 + word}" for word in range(6)]
    base = 3 * (block // 2)
    first, second, third = words[base : base + 3]
    take = ([f"mov.b32 u, {first};", f"shf.r.wrap.b32 v, {first}, {second}, 24;"] if block % 2 == 0 else
            [f"shf.r.wrap.b32 u, {second}, {third}, 16;", f"shr.u32 v, {third}, 8;"])
    lines = ["{", ".reg .b32 u, v, t, sel, hi, lo;", *take]
    for part, source in enumerate(("u", "v")):
        for shift, mask in ((4, "0x0000ffff"), (2, "0x00ff00ff"), (1, "0x0f0f0f0f")):
            # codes spread to nibbles: the lower half of every field stays, the upper moves up
            lines += [f"shl.b32 t, {source}, {shift};", f"lop3.b32 {source}, {source}, t, {mask}, 0xe4;"]
        lines += [f"and.b32 {source}, {source}, 0x77777777;"]
        for half in range(2):
            place = 4 * part + 2 * half
            lines += [f"shr.u32 sel, {source}, {16 * half};" if half else f"mov.b32 sel, {source};",
                      "prmt.b32 hi, $14, $16, sel;", "prmt.b32 lo, $18, $20, sel;",
                      f"prmt.b32 ${place}, lo, hi, 0x5140;", f"prmt.b32 ${place + 1}, lo, hi, 0x7362;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def keep_field(word: int, bit: int, width: int, shift: int) -> str:
    """Return PTX that keeps `width` bits of both halves of $1 or $2; those from `shift` on come shifted by it."""
    return f"and.b32 $0, ${1 + word}, {65537 * ((1 << width) - 1) << (bit if bit < shift else bit - shift)};"


@gluon.constexpr_function
def shift_down(shift: int) -> str:
    """Return PTX that shifts."""
    return f"shr.u32 $0, $1, {shift};"


@gluon.constexpr_function
def field_shift(bits: int) -> int:
    """Return the bit from which on codes are shifted down: what lies below fits the ten digits of a half."""
    return {1: 10, 2: 10, 4: 8, 8: 8}.get(bits, 0)


@gluon.constexpr_function
def registers(outputs: int, inputs: int) -> str:
    """Return a block's constraints, of so many 32-bit outputs and inputs; outputs are written before inputs end."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@gluon.constexpr_function
def halves(count: int) -> tuple:
    """Return the dtypes of a block's outputs."""
    return (gl.float16,) * count


@gluon.jit
def load_zeros(zeros, place, BITS: gl.constexpr):
    """Return zero points, which are one packed little-endian stream."""
    bit = place * BITS
    low = gl.load(zeros + bit // 8).to(gl.int32)
    if 8 % BITS != 0:
        low = low | (gl.load(zeros + (bit + BITS - 1) // 8).to(gl.int32) << 8)
    return ((low >> (bit % 8)) & ((1 << BITS) - 1)).to(gl.float32)


@gluon.jit
def take_fragments(ring, stage, layout: gl.constexpr, BITS: gl.constexpr):
    """Return a stage's tiles as fragments, once they are there."""
    if BITS == 3:
        return (ring.index(stage * 3).load(layout), ring.index(stage * 3 + 1).load(layout),
                ring.index(stage * 3 + 2).load(layout))
    else:
        first = ring.index(stage).load(layout)
        return first, first, first


@gluon.jit
def load_table(table, lut, BITS: gl.constexpr, FORM: gl.constexpr, MIRRORED: gl.constexpr):
    """Return what a stream's codes stand for, as eight scalars: bytes of the table, or steps between its levels."""
    if FORM == "any" or (FORM == "symmetric" and BITS > 2):
        return (gl.load(lut), gl.load(lut + 1), gl.load(lut + 2), gl.load(lut + 3), gl.load(lut + 4), gl.load(lut + 5),
                gl.load(lut + 6), gl.load(lut + 7))
    else:
        if MIRRORED:  # the table holds the upper half of a symmetric one
            top = gl.load(table + (BITS - 1)).to(gl.float32)
            near = gl.load(table).to(gl.float32)
            low = -top
            first = top + near if BITS == 1 else top - near
            second = top + near
        else:
            low = gl.load(table).to(gl.float32)
            first = gl.load(table + 1).to(gl.float32) - low
            second = gl.load(table + (BITS if BITS < 3 else 1)).to(gl.float32) - low
        # a field is the subnormal code 2^(bit - 24), its number was scaled by 2^(9 - bit)
        return low, first * 32768.0, second * 16384.0, low, low, low, low, low


@gluon.jit
def multiply(acc, more, words, others, lut, table, BITS: gl.constexpr, FORM: gl.constexpr, lb: gl.constexpr,
             COLUMNS: gl.constexpr):
    """Return `acc` and `more` plus products of elements `words` with the other operand; see `total_of`.

    `others` is as of `_operands`; `lut` is what `load_table` returned; `table` points to the table, for 8-bit codes.
    """
    first, second, third = words
    if FORM == "affine" or (FORM == "symmetric" and BITS <= 2):
        SHIFT: gl.constexpr = field_shift(BITS)
        TWO: gl.constexpr = FORM == "symmetric" and BITS == 2
        WIDTH: gl.constexpr = 1 if TWO else BITS
        HALF: gl.constexpr = 16 // BITS
        shifted = gl.inline_asm_elementwise(shift_down(SHIFT), "=r,r", [first], dtype=gl.int32, is_pure=True, pack=1)
        for pair in gl.static_range(HALF):  # a code is a subnormal number as it stands: there is no exponent to set
            b0, b1 = _operands(others, pair, lb, COLUMNS)
            for side in gl.static_range(2):
                source = first if (2 * pair + side) % HALF * BITS < SHIFT else shifted
                b = b0 if side == 0 else b1
                a = gl.inline_asm_elementwise(keep_field(2 * pair // HALF, (2 * pair + side) % HALF * BITS, WIDTH,
                                                         SHIFT),
                                              "=r,r,r", [source], dtype=gl.float16, is_pure=True, pack=2)
                if TWO:
                    acc = mma_v2(a, b, acc)
                    a = gl.inline_asm_elementwise(keep_field(2 * pair // HALF, (2 * pair + side) % HALF * BITS + 1, 1,
                                                             SHIFT),
                                                  "=r,r,r", [source], dtype=gl.float16, is_pure=True, pack=2)
                    more = mma_v2(a, b, more)
                elif side == 0:  # two sums, for a product has to wait for the one before
                    acc = mma_v2(a, b, acc)
                else:
                    more = mma_v2(a, b, more)
    elif BITS == 2:
        for word in gl.static_range(2):
            parts = gl.inline_asm_elementwise(two_bits(word), registers(8, 6), [first, lut[0], lut[4]], dtype=halves(8),
                                              is_pure=True, pack=2)
            acc, more = _products(acc, more, parts, others, 4 * word, lb, COLUMNS)
    elif BITS == 3:
        for block in gl.static_range(4):
            parts = gl.inline_asm_elementwise(three_bits(block), registers(8, 14),
                                              [first, second, third, lut[0], lut[1], lut[4], lut[5]], dtype=halves(8),
                                              is_pure=True, pack=2)
            acc, more = _products(acc, more, parts, others, 4 * block, lb, COLUMNS)
    elif BITS == 4 and FORM == "symmetric":
        for word in gl.static_range(2):
            parts = gl.inline_asm_elementwise(four_signed_bits(word), registers(4, 10),
                                              [first, lut[2], lut[3], lut[6], lut[7]], dtype=halves(4), is_pure=True,
                                              pack=2)
            acc, more = _products(acc, more, parts, others, 2 * word, lb, COLUMNS)
    elif BITS == 4:
        for word in gl.static_range(2):
            parts = gl.inline_asm_elementwise(
                four_bits(word), registers(4, 18),
                [first, lut[0], lut[1], lut[2], lut[3], lut[4], lut[5], lut[6], lut[7]], dtype=halves(4), is_pure=True,
                pack=2)
            acc, more = _products(acc, more, parts, others, 2 * word, lb, COLUMNS)
    else:
        parts = (gl.load(table + (first & 255)), gl.load(table + (first >> 8 & 255)),
                 gl.load(table + (first >> 16 & 255)), gl.load(table + (first >> 24 & 255)))
        acc, more = _products(acc, more, parts, others, 0, lb, COLUMNS)
    return acc, more


@gluon.jit
def _operands(others, pair: gl.constexpr, lb: gl.constexpr, COLUMNS: gl.constexpr):
    # two parts of the other operand, from shared memory or, where it has no room, from memory
    near, first, far, step, held = others
    if COLUMNS == 1:  # one vector stands for all columns
        one = near.index(first + pair).load(gl.SliceLayout(2, lb))
        words = one[:, :, None] + gl.zeros(far.shape, gl.int32, lb)
    elif COLUMNS:
        words = near.index(first + pair).permute((0, 2, 1)).load(lb)
    else:
        words = gl.load(far + pair * step, held, other=0)
    # a lane's four words hold two parts: two registers each, neighbours, as the tensor cores take them
    return gl.inline_asm_elementwise("mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
                                     "=r,=r,=r,=r,r,r,r,r", [words], dtype=halves(2), is_pure=True, pack=4)


@gluon.jit
def _products(acc, more, parts, others, start: gl.constexpr, lb: gl.constexpr, COLUMNS: gl.constexpr):
    for pair in gl.static_range(len(parts) // 2):
        b0, b1 = _operands(others, start + pair, lb, COLUMNS)
        acc = mma_v2(parts[2 * pair], b0, acc)
        more = mma_v2(parts[2 * pair + 1], b1, more)
    return acc, more


@gluon.jit
def total_of(acc, more, lut, sums, BITS: gl.constexpr, FORM: gl.constexpr):
    """Return the products in units of the scale, from what `multiply` summed and the sums of the numbers themselves."""
    if FORM == "symmetric" and BITS == 2:
        return acc * lut[1] + more * lut[2] + lut[0] * sums
    elif FORM == "affine" or (FORM == "symmetric" and BITS == 1):
        return (acc + more) * lut[1] + lut[0] * sums
    else:
        return acc + more
