"""Codes of 8 bits, or of 4 bits and any table, to 8-bit fragments of the tensor cores, for a vector in 8-bit digits.

A fragment register holds four int8 numbers that meet four neighbouring numbers of the other operand. Which four codes
share one is free, for the vector's digits are written to suit (`arrival.py`); so codes are never moved, only masked or
looked up. A lane takes four words of a stream at a time. README.md counts the instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tersor.ops.codebook_linear.kernels.fragments import registers
from tersor.ops.codebook_linear.kernels.planes import in_planes, load_units


@gluon.constexpr_function
def parts_of(bits: int) -> int:
    """Return the registers of four codes that a word gives."""
    return {4: 2, 8: 1}[bits]


@gluon.constexpr_function
def sums_of(bits: int) -> int:
    """Return how many sums of products are kept apart: two of a digit of levels, for a product waits for the last."""
    return {4: 4, 8: 2}[bits]


@gluon.constexpr_function
def _bytes(count: int) -> tuple:
    """Return the dtypes of a block's outputs."""
    return (gl.int8,) * count


@gluon.constexpr_function
def _signed(word: int) -> str:
    """Return PTX: the bytes of one of the words $1 … $4, less 128."""
    return f"xor.b32 $0, ${1 + word}, 0x80808080;"


@gluon.constexpr_function
def _four_bits(word: int) -> str:
    """Return PTX: 8 codes of one of the words $8 … $11 through the tables $12 $16 … $40, a digit in a register.

    `prmt` gives zero for a nibble with its top bit set, as no table entry has its own: so lookups of the lower half of
    the codes and of the upper half, each in a table of eight, are summed by the tensor cores instead of being merged.
    """
    code = f"${8 + word}"
    lines = ["{", ".reg .b32 u, s, t;", f"xor.b32 u, {code}, 0x88888888;", f"shr.u32 s, {code}, 16;",
             "shr.u32 t, u, 16;"]
    for half in range(2):
        lower, upper = (code, "u") if half == 0 else ("s", "t")
        lines += [f"prmt.b32 ${4 * half}, $12, $16, {lower};", f"prmt.b32 ${4 * half + 1}, $20, $24, {upper};",
                  f"prmt.b32 ${4 * half + 2}, $28, $32, {lower};", f"prmt.b32 ${4 * half + 3}, $36, $40, {upper};"]
    return "\n".join([*lines, "}"])


@gluon.jit
def level(table, code: gl.constexpr, BITS: gl.constexpr, MIRRORED: gl.constexpr):
    """Return what a code stands for."""
    HALF: gl.constexpr = (1 << BITS) // 2
    if not MIRRORED:
        return gl.load(table + code).to(gl.float32)
    elif code >= HALF:  # the table holds the upper half of a symmetric one
        return gl.load(table + (code - HALF)).to(gl.float32)
    else:
        return -gl.load(table + (HALF - 1 - code)).to(gl.float32)


@gluon.jit
def load_levels(table, BITS: gl.constexpr, FORM: gl.constexpr, MIRRORED: gl.constexpr):
    """Return (lowest, units, words): `level = lowest + Σ units · digit`, and the digits' tables, four bytes a word.

    Levels of 4-bit codes that are looked up are rounded to 14 bits of the table's range.
    """
    low = level(table, 0, BITS, MIRRORED)
    if in_planes(BITS, FORM):
        levels = (low,)
        for code in gl.static_range(1, 1 << BITS):
            levels = levels + (level(table, code, BITS, MIRRORED),)
        return low, load_units(levels, BITS, FORM), ()
    elif BITS == 4:
        top = low
        for code in gl.static_range(1, 16):
            one = level(table, code, BITS, MIRRORED)
            low = gl.minimum(low, one)
            top = gl.maximum(top, one)
        unit = gl.maximum(top - low, 1e-30) / 16383.0
        words = ()
        for word in gl.static_range(4):
            high = 0
            less = 0
            for byte in gl.static_range(4):
                digits = ((level(table, 4 * word + byte, BITS, MIRRORED) - low) / unit + 0.5).to(gl.int32)
                high = high | (digits >> 7) << (8 * byte)
                less = less | (digits & 127) << (8 * byte)
            words = words + (high, less)
        return low, (unit * 128.0, unit), words
    else:
        step = level(table, 1, BITS, MIRRORED) - low
        return low + 128.0 * step, (step, step), ()


@gluon.jit
def _plane(acc, words, b, source: gl.constexpr):
    a = gl.inline_asm_elementwise(source, "=r,r,r,r,r", [words], dtype=gl.int8, is_pure=True, pack=4)
    return mma_v2(a, b, acc)


@gluon.jit
def _operands(digits, part, lb: gl.constexpr, doubled: gl.constexpr):
    # the vector's digits for the codes of a part, in the order of a lane's words: four columns stand for eight
    words = digits.index(part).permute((0, 2, 1)).load(gl.SliceLayout(2, doubled))
    both = words[:, :, None, :] + gl.zeros([words.shape[0], words.shape[1], 2, words.shape[2]], gl.int32, doubled)
    # words lie by (lane, word, half of the operand), an operand's rows are by (half, lane, word)
    rows = both.reshape([words.shape[0], 16, 2, 2 * words.shape[2]]).permute([0, 2, 1, 3])
    both = gl.convert_layout(rows.reshape([words.shape[0], 32, 2 * words.shape[2]]), lb, assert_trivial=True)
    return gl.inline_asm_elementwise("mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
                                     "=r,=r,=r,=r,r,r,r,r", [both], dtype=_bytes(4), is_pure=True, pack=4)


@gluon.jit
def multiply_digits(sums, words, digits, first, tables, lb: gl.constexpr, doubled: gl.constexpr, BITS: gl.constexpr):
    """Return `sums` plus products of a lane's `words` with the digits of the parts `first` and on."""
    if BITS == 8:
        b = _operands(digits, first, lb, doubled)
        even = _plane(_plane(sums[0], words[0], b[0], _signed(0)), words[0], b[2], _signed(2))
        odd = _plane(_plane(sums[1], words[0], b[1], _signed(1)), words[0], b[3], _signed(3))
        return even, odd
    else:
        high, also_high, less, also_less = sums
        t = tables
        b = _operands(digits, first, lb, doubled) + _operands(digits, first + 1, lb, doubled)
        for word in gl.static_range(4):
            a = gl.inline_asm_elementwise(_four_bits(word), registers(8, 36),
                                          [words[0], t[0], t[2], t[4], t[6], t[1], t[3], t[5], t[7]], dtype=_bytes(8),
                                          is_pure=True, pack=4)
            for half in gl.static_range(2):
                high = mma_v2(a[4 * half], b[4 * half + word], high)
                less = mma_v2(a[4 * half + 2], b[4 * half + word], less)
                also_high = mma_v2(a[4 * half + 1], b[4 * half + word], also_high)
                also_less = mma_v2(a[4 * half + 3], b[4 * half + word], also_less)
        return high, also_high, less, also_less


@gluon.jit
def weigh(sums, units, BITS: gl.constexpr):
    """Return the sums of `multiply_digits` weighed and added, float32."""
    if BITS == 8:
        return (sums[0] + sums[1]).to(gl.float32) * units[0]
    else:
        return (sums[0] + sums[1]).to(gl.float32) * units[0] + (sums[2] + sums[3]).to(gl.float32) * units[1]
