"""Codes of tokens as half-precision operands of the tensor cores, in registers.

A lane holds elements of several codes each, two neighbours at a time: of one token for scores, of two tokens for
mixtures. `decoded` gives a tensor for each code of an element, and two neighbours' numbers share a register, as the
tensor cores take them. No number passes through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.shapes import element_codes

PAIRS = ("0x5140", "0x7362")  # the lower, the upper two bytes of two words, in turn


codes_of = gluon.constexpr_function(element_codes)


@gluon.constexpr_function
def is_wide(bits: int, dim: int) -> bool:
    """Tell whether elements of 2-bit codes have 32 bits instead of 16."""
    return bits == 2 and codes_of(bits, dim) == 16


@gluon.constexpr_function
def two_bits(wide: bool) -> str:
    """Return PTX: codes of two elements through the four half-precision levels of the last two operands."""
    count = 16 if wide else 8
    near, far, both = (f"${count + place}" for place in ((2, 4, 6) if wide else (1, 3, 5)))
    lines = ["{", ".reg .b32 x, s;"]
    for part in range(2 if wide else 1):
        lines += [f"prmt.b32 x, ${count}, ${count + 1}, {PAIRS[part]};" if wide else
                  f"prmt.b32 x, ${count}, ${count}, 0x3120;"]
        for code in range(4):  # a code c, twice a byte: 2 c and 2 c + 1, the bytes of its level
            place = 8 * part + code
            lines += [f"shr.u32 s, x, {2 * code};" if code else "mov.b32 s, x;", "and.b32 s, s, 0x03030303;",
                      f"mad.lo.u32 s, s, 0x22, {both};", f"prmt.b32 ${place}, {near}, {far}, s;",
                      "shr.u32 s, s, 16;", f"prmt.b32 ${place + 4}, {near}, {far}, s;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def nibbles(place: int, tables: tuple, signed: bool) -> list:
    """Return PTX: four pairs of codes, the nibbles of `w`, to $place …, through tables of bytes, high then low."""
    high, low = f"{tables[0]}, {tables[1]}", f"{tables[2]}, {tables[3]}"
    lines = ["mov.b32 i, w;"]
    if signed:  # codes below 8 are the mirror images of those above: their index counts down
        lines = ["shr.u32 i, w, 3;", "and.b32 i, i, 0x11111111;", "mul.lo.u32 i, i, 7;",
                 "lop3.b32 i, w, i, 0x77777777, 0x82;"]
    for half in range(2):
        lines += ["shr.u32 i, i, 16;"] if half else []
        lines += [f"prmt.b32 hi, {high}, i;", f"prmt.b32 lo, {low}, i;"]
        if signed:
            lines += ["shr.u32 w, w, 16;"] if half else []
            lines += ["prmt.b32 s, 0x80808080, 0x80808080, w;", "mad.lo.u32 s, s, 2, 0;",
                      "lop3.b32 hi, hi, s, 0x80808080, 0xd2;"]
        lines += [f"prmt.b32 ${place + 2 * half}, lo, hi, 0x6240;", f"prmt.b32 ${place + 2 * half + 1}, lo, hi, 0x7351;"]
    return lines


@gluon.constexpr_function
def three_bits() -> str:
    """Return PTX: 8 codes of each of two elements through a table of 8 levels."""
    lines = ["{", ".reg .b32 a, b, t, w, i, s, hi, lo;"]
    for name, source in (("a", "$8"), ("b", "$9")):
        lines += [f"mov.b32 {name}, {source};"]
        for shift, mask in ((4, "0x00000fff"), (2, "0x003f003f"), (1, "0x07070707")):
            # codes spread to nibbles: the lower half of every field stays, the upper moves up
            lines += [f"shl.b32 t, {name}, {shift};", f"lop3.b32 {name}, {name}, t, {mask}, 0xe4;"]
        lines += [f"and.b32 {name}, {name}, 0x77777777;"]
    for part in range(2):
        lines += [f"prmt.b32 w, a, b, {PAIRS[part]};", *nibbles(4 * part, ("$10", "$12", "$14", "$16"), False)]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def four_bits() -> str:
    """Return PTX: 8 codes of each of two elements through the 8 magnitudes of 16 symmetric levels."""
    lines = ["{", ".reg .b32 w, i, s, hi, lo;"]
    for part in range(2):
        lines += [f"prmt.b32 w, $8, $9, {PAIRS[part]};", *nibbles(4 * part, ("$10", "$12", "$14", "$16"), True)]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def eight_bits() -> str:
    """Return PTX: 4 numbers of 8 bits of each of two elements."""
    lines = ["{", ".reg .b32 x;", ".reg .b16 lo, hi;"]
    for part in range(2):
        lines += [f"prmt.b32 x, $4, $5, {PAIRS[part]};", "mov.b32 {lo, hi}, x;",
                  f"cvt.rn.f16x2.e4m3x2 ${2 * part}, lo;", f"cvt.rn.f16x2.e4m3x2 ${2 * part + 1}, hi;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def registers(outputs: int, inputs: int) -> str:
    """Return constraints of so many 32-bit outputs and inputs; outputs are written before inputs end."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@gluon.constexpr_function
def halves(count: int) -> tuple:
    """Return the dtypes of a block's outputs."""
    return (gl.float16,) * count


@gluon.jit
def decoded(words, table, BITS: gl.constexpr, WIDE: gl.constexpr):
    """Return the numbers of every code of elements `words`, a tensor a code; `table`: see `load_table`."""
    if BITS == 8:
        return gl.inline_asm_elementwise(eight_bits(), registers(4, 2), [words], dtype=halves(4), is_pure=True, pack=2)
    elif BITS == 2 and WIDE:
        return gl.inline_asm_elementwise(two_bits(True), registers(16, 8), [words, table[0], table[1], table[2]],
                                         dtype=halves(16), is_pure=True, pack=2)
    elif BITS == 2:
        return gl.inline_asm_elementwise(two_bits(False), registers(8, 7), [words, table[0], table[1], table[2]],
                                         dtype=halves(8), is_pure=True, pack=2)
    elif BITS == 3:
        return gl.inline_asm_elementwise(three_bits(), registers(8, 10), [words, table[0], table[1], table[2],
                                                                          table[3]],
                                         dtype=halves(8), is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(four_bits(), registers(8, 10), [words, table[0], table[1], table[2],
                                                                         table[3]],
                                         dtype=halves(8), is_pure=True, pack=2)


@gluon.jit
def load_table(table, warp):
    """Return the four words of a table of levels, (S, 1, 1) each: registers of their own, not the warp's; see `shapes`."""
    at = table + 4 * warp
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def load_words(base, place, rest, inside, BITS: gl.constexpr, WIDE: gl.constexpr,
               ELEMENTS: gl.constexpr):
    """Return elements `rest` of tokens `place` behind `base`, int32 pointers; `ELEMENTS` a token."""
    if BITS == 3:  # three bytes an element, anywhere in two words
        byte = place * (3 * ELEMENTS) + rest * 3
        low = gl.load(base + (byte >> 2), inside, other=0)
        high = gl.load(base + (byte >> 2) + 1, inside, other=0)
        return gl.inline_asm_elementwise("shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, (byte & 3) * 8],
                                         dtype=gl.int32, is_pure=True, pack=1)
    elif BITS == 2 and not WIDE:
        return gl.load(base.to(gl.pointer_type(gl.int16), bitcast=True) + place * ELEMENTS + rest, inside, other=0)
    else:
        return gl.load(base + place * ELEMENTS + rest, inside, other=0)
