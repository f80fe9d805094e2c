"""Numbers of 16 bits from streams along outputs: a thread makes 32 of a row, two at a time; see `halves.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel


@gluon.jit
def bits_until(phase, SHIFTS: gl.constexpr):
    """Bits that have entered before a phase: as in `filtering.py`, for Gluon."""
    total = phase * 0
    for p in gl.static_range(len(SHIFTS)):
        total += gl.where(phase > p, SHIFTS[p], 0)
    return total


@gluon.jit
def _half(pair, SHIFT: gl.constexpr):
    return (pair >> SHIFT).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@kernel
@gluon.jit(do_not_specialize=["first", "rows", "length", "units", "count"])
def decode_across(codes, taps, scales, out, first, rows, width, length, units, count, UNIT: gl.constexpr,
                  SHIFTS: gl.constexpr, STEP: gl.constexpr, MEMORY: gl.constexpr, ROWS: gl.constexpr,
                  WORDS: gl.constexpr):
    """Rows `first` … of streams along outputs: words (stream, width / 32) to (rows, width)."""
    PERIOD: gl.constexpr = len(SHIFTS)
    OWN: gl.constexpr = gl.BlockedLayout([1, 1, 16], [32 // WORDS, WORDS, 1], [gl.num_warps(), 1, 1], [2, 1, 0])
    place = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, OWN)))
    column = gl.program_id(1) * WORDS + gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, OWN)))
    bits = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, OWN)))[None, None, :]
    inside = (place < rows)[:, None] & (column < width // 32)[None, :]
    at = gl.minimum(first + place, length - 1)
    index = gl.minimum(((at // UNIT + 1) * count - 1) // units, count - 1)
    start = UNIT * (index * units // count)
    size = gl.where(index == count - 1, length, UNIT * ((index + 1) * units // count)) - start
    own = at - start
    phase = own % PERIOD
    newest = own // PERIOD * STEP + bits_until(phase + 1, SHIFTS) - 1
    total = size // PERIOD * STEP + bits_until(size % PERIOD, SHIFTS)
    base = start // PERIOD * STEP
    sums = gl.zeros((ROWS, WORDS, 16), gl.int32, OWN)
    for age in gl.static_range(MEMORY):
        bit = newest - age
        bit = gl.where(bit < 0, bit + total, bit) + base
        word = gl.load(codes + bit.to(gl.int64)[:, None] * (width // 32) + column[None, :], inside, other=0)
        half = gl.load(taps + phase * MEMORY + age).to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32)
        pair = (half & 0xFFFF) | (half << 16)
        signs = ~(gl.expand_dims(word, 2) << (15 - bits)) & -2147450880
        sums = gl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [sums, pair[:, None, None] ^ signs],
                                         dtype=gl.int32, is_pure=True, pack=1)
    scale = gl.load(scales + at).to(gl.float32)[:, None, None]
    there = out + place.to(gl.int64)[:, None, None] * width + column[None, :, None] * 32 + bits
    every = gl.expand_dims(inside, 2) & (bits < 16)
    gl.store(there, (_half(sums, 0) * scale).to(out.dtype.element_ty), every)
    gl.store(there + 16, (_half(sums, 16) * scale).to(out.dtype.element_ty), every)
