"""Some bytes of a row, asked for by each lane and kept in its registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import lookups
from tersor.ops.kv_attention.kernels.arriving import load

SHIFTED = gl.constexpr(lookups.SHIFTED)


@gluon.constexpr_function
def run_of(row: int, each: int) -> int:
    """Return how many words are loaded together: four, two or one, or 0 where bytes begin within a word."""
    if row % 4 or each % 4:
        return 0
    return 4 if not row % 16 and not each % 16 else 2 if not row % 8 and not each % 8 else 1


@gluon.jit
def load_row(words, far, byte, ROW: gl.constexpr, EACH: gl.constexpr):
    """Return EACH bytes behind `words + far`, from `byte` on, a multiple of EACH from where a row of ROW bytes begins."""
    RUN: gl.constexpr = run_of(ROW, EACH)
    COUNT: gl.constexpr = (EACH + 3) // 4
    at = words + (far + (byte >> 2))
    found = ()
    if RUN == 0:
        raw = ()
        for place in gl.static_range(COUNT + 1):
            raw = raw + (gl.load(at + place),)
        for place in gl.static_range(COUNT):
            found = found + (gl.inline_asm_elementwise(SHIFTED, "=r,r,r,r", [raw[place], raw[place + 1], (byte & 3) * 8],
                                                       dtype=gl.int32, is_pure=True, pack=1),)
    elif RUN == 1:
        for place in gl.static_range(COUNT):
            found = found + (gl.load(at + place),)
    else:
        for place in gl.static_range(COUNT // RUN):
            found = found + load(at + place * RUN, RUN)
    return found
