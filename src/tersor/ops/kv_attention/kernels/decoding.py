"""Codes of tokens as half-precision operands of the tensor cores, in registers.

A lane holds elements of several codes each, two neighbours at a time: of one token for scores, of two tokens for
mixtures. `decoded` gives a tensor for each code of an element, and two neighbours' numbers share a register, as the
tensor cores take them. No number passes through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import ptx
from tersor.ops.kv_attention.shapes import element_codes

TWO_WIDE, TWO_BITS = gl.constexpr(ptx.two_bits(True)), gl.constexpr(ptx.two_bits(False))
THREE_BITS, FOUR_BITS, EIGHT_BITS = (gl.constexpr(text) for text in (ptx.three_bits(), ptx.four_bits(), ptx.eight_bits()))


codes_of = gluon.constexpr_function(element_codes)


@gluon.constexpr_function
def is_wide(bits: int, dim: int) -> bool:
    """Tell whether elements of 2-bit codes have 32 bits instead of 16."""
    return bits == 2 and codes_of(bits, dim) == 16


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
        return gl.inline_asm_elementwise(EIGHT_BITS, registers(4, 2), [words], dtype=halves(4), is_pure=True, pack=2)
    elif BITS == 2 and WIDE:
        return gl.inline_asm_elementwise(TWO_WIDE, registers(16, 8), [words, table[0], table[1], table[2]],
                                         dtype=halves(16), is_pure=True, pack=2)
    elif BITS == 2:
        return gl.inline_asm_elementwise(TWO_BITS, registers(8, 7), [words, table[0], table[1], table[2]],
                                         dtype=halves(8), is_pure=True, pack=2)
    elif BITS == 3:
        return gl.inline_asm_elementwise(THREE_BITS, registers(8, 10), [words, table[0], table[1], table[2],
                                                                          table[3]],
                                         dtype=halves(8), is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(FOUR_BITS, registers(8, 10), [words, table[0], table[1], table[2],
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
