"""PTX that turns codes into half-precision numbers, put together as text: two neighbouring elements at a time.

$0 … are the numbers of each code, of the first element in the lower half; then come the two elements, and the table.
"""

from __future__ import annotations

PAIRS = ("0x5140", "0x7362")  # the lower, the upper two bytes of two words, in turn


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


def four_bits() -> str:
    """Return PTX: 8 codes of each of two elements through the 8 magnitudes of 16 symmetric levels."""
    lines = ["{", ".reg .b32 w, i, s, hi, lo;"]
    for part in range(2):
        lines += [f"prmt.b32 w, $8, $9, {PAIRS[part]};", *nibbles(4 * part, ("$10", "$12", "$14", "$16"), True)]
    return "\n".join([*lines, "}"])


def eight_bits() -> str:
    """Return PTX: 4 numbers of 8 bits of each of two elements."""
    lines = ["{", ".reg .b32 x;", ".reg .b16 lo, hi;"]
    for part in range(2):
        lines += [f"prmt.b32 x, $4, $5, {PAIRS[part]};", "mov.b32 {lo, hi}, x;",
                  f"cvt.rn.f16x2.e4m3x2 ${2 * part}, lo;", f"cvt.rn.f16x2.e4m3x2 ${2 * part + 1}, hi;"]
    return "\n".join([*lines, "}"])
