"""Around the counts of several vectors: vectors as bit planes before, filters of counts after."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.trellis_linear.kernels.across import bits_until
from tersor.ops.trellis_product.shapes import several as shapes
from tersor.ops.window_linear.kernels.shared import arrived

AROUND_WARPS = gl.constexpr(shapes.AROUND_WARPS)
CHUNK = gl.constexpr(shapes.CHUNK)
WORD = gl.constexpr(32)
LEAST = gl.constexpr(27 << 23)  # 2^-100: what vectors are cut for, if all of their numbers are smaller


@gluon.jit
def _magnitudes(value):
    # the bits of magnitudes, which are ordered as these are, and above all where a number is not finite
    return value.to(gl.float32).to(gl.int32, bitcast=True) & 0x7FFFFFFF


@kernel
@gluon.jit
def cut(x, planes, units, sums, width, row_step, batch, steps, chunks, PLANES: gl.constexpr, EIGHTS: gl.constexpr):
    """Vectors as integers of PLANES bits: a program writes the planes of 4,096 numbers of one, and their sum.

    `units` (vectors,) is what an integer counts: the largest number is 2^(PLANES - 1) - 1 of them. NaN where a vector
    is not finite. To (groups, steps, 4, EIGHTS, PLANES / 2, 32 lanes, 2, 2 halves), as `count_several` meets them.
    """
    OWN: gl.constexpr = gl.BlockedLayout([1, 32], [32, 1], [AROUND_WARPS, 1], [1, 0])  # a thread has whole words
    ready = arrived()
    row, chunk = gl.program_id(0), gl.program_id(1)
    word = gl.arange(0, CHUNK // WORD, layout=gl.SliceLayout(1, OWN))
    bit = gl.arange(0, WORD, layout=gl.SliceLayout(0, OWN))[None, :]
    place = word[:, None] * WORD + bit
    left = gl.where(row < batch, width, 0)
    near = x + ready + row.to(gl.int64) * row_step
    mine = gl.load(near + chunk * CHUNK + place, chunk * CHUNK + place < left, other=0.0)
    peak = _magnitudes(mine)
    for later in range(1, chunks):
        start = (chunk + later) % chunks * CHUNK
        peak = gl.maximum(peak, _magnitudes(gl.load(near + start + place, start + place < left, other=0.0)))
    bits = gl.maximum(gl.max(gl.max(peak, 1), 0), LEAST)
    largest = bits.to(gl.float32, bitcast=True)
    most = (1 << (PLANES - 1)) - 1
    value = gl.minimum(gl.maximum(mine.to(gl.float32) * (most / largest), -most), most)
    whole = gl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [value], dtype=gl.int32, is_pure=True, pack=1)
    every = chunk * (CHUNK // WORD) + word
    product = (row // (8 * EIGHTS) * steps + every // 32) * 4 + every % 32 // 8
    there = (product * EIGHTS + row // 8 % EIGHTS) * (PLANES * 64) + row % 8 * 16 + every % 4 * 4 + every % 8 // 4
    for plane in gl.static_range(PLANES):
        gl.store(planes + ready + there + (plane // 2 * 128 + plane % 2 * 2), gl.sum((whole >> plane & 1) << bit, 1),
                 every < steps * 32)
    gl.store(sums + ready + row * chunks + chunk, gl.sum(gl.sum(whole, 1), 0))
    if chunk == 0:
        gl.store(units + ready + row, largest / most + largest * 0.0)


@gluon.jit
def _segment(place, length, units, count, UNIT: gl.constexpr):
    # the first number of the segment that a number lies in, and how many that has; see `trellis_linear/shapes.py`
    index = gl.minimum(((gl.minimum(place, length - 1) // UNIT + 1) * count - 1) // units, count - 1)
    start = UNIT * (index * units // count)
    return start, gl.where(index == count - 1, length, UNIT * ((index + 1) * units // count)) - start


@kernel
@gluon.jit
def filter_counts(counts, units, sums, taps, scales, out, length, stream, batch, chunks, cuts, count,
                  UNIT: gl.constexpr, SHIFTS: gl.constexpr, STEP: gl.constexpr, MEMORY: gl.constexpr,
                  PARTS: gl.constexpr, BLOCK: gl.constexpr, AGES: gl.constexpr):
    """Lines (batch, length) of what the set signs of streams add up to, (PARTS, batch, stream).

    A sign counts for one or for minus one, so streams are twice what set signs add up to less what all would. A thread
    asks for all that a number needs at once. `cuts` and `count` are the units and the segments of a line.
    """
    OWN: gl.constexpr = gl.BlockedLayout([1, AGES], [32, 1], [AROUND_WARPS, 1], [1, 0])
    place = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, OWN))
    age = gl.arange(0, AGES, layout=gl.SliceLayout(0, OWN))[None, :]
    row = gl.program_id(1)
    inside = place < length
    start, size = _segment(place, length, cuts, count, UNIT)
    own = place - start
    phase = own % len(SHIFTS)
    newest = own // len(SHIFTS) * STEP + bits_until(phase + 1, SHIFTS) - 1
    total = size // len(SHIFTS) * STEP + bits_until(size % len(SHIFTS), SHIFTS)
    bit = newest[:, None] - age
    bit = gl.where(bit < 0, bit + total[:, None], bit) + (start // len(SHIFTS) * STEP)[:, None]
    seen = inside[:, None] & (age < MEMORY)
    tap = gl.load(taps + phase[:, None] * MEMORY + age, seen, other=0.0)
    scale = gl.load(scales + place, inside, other=0.0).to(gl.float32)
    ready = arrived()
    near = counts + ready + row.to(gl.int64) * stream
    found = gl.load(near + bit, seen, other=0)
    for _ in gl.static_range(1, PARTS):
        near += batch * stream
        found += gl.load(near + bit, seen, other=0)
    every = 0
    for chunk in range(chunks):
        every += gl.load(sums + ready + row * chunks + chunk)
    value = gl.sum(tap * (2 * found - every).to(gl.float32), 1) * scale * gl.load(units + ready + row)
    gl.store(out + row.to(gl.int64) * length + place, value.to(out.dtype.element_ty), inside)
