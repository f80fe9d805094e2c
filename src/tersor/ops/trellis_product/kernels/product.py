"""One vector times linear trellis codes whose lines run along outputs: a product of signs, filtered where it is made.

A program takes blocks: parts of segments. It multiplies the signs that the windows of a block see, keeps the sums of
each warp in shared memory, and filters them once all are there. See README.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tersor.ops.codebook_linear.kernels.arrival import ACROSS, arrive, digest
from tersor.ops.codebook_linear.kernels.planes import multiply_planes, no_sums, take_codes, weigh_planes
from tersor.ops.dispatch import kernel
from tersor.ops.trellis_linear.kernels.across import bits_until
from tersor.ops.trellis_product.shapes import one as shapes

UNIT = gl.constexpr(shapes.UNIT)
SIGN = gl.constexpr(32)  # signs of a word
FORM = gl.constexpr("affine")


@gluon.constexpr_function
def _power(count: int) -> int:
    """Return the least power of two that is as large."""
    return 1 << (count - 1).bit_length()


@gluon.constexpr_function
def _filtering(ages: int, warps: int):
    """Return the layout of [numbers, ages]: four ages in a lane."""
    return gl.BlockedLayout([1, 4], [128 // ages if ages < 128 else 1, min(32, ages // 4)], [warps, 1], [1, 0])


@gluon.constexpr_function
def _shares(rows: int, warps: int):
    """Return the layout of [tiles, warps, rows of a tile]: all warps' shares of a row in one lane."""
    return gl.BlockedLayout([1, warps, 1], [32 // min(32, rows), 1, min(32, rows)], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def _bits_of(size, SHIFTS: gl.constexpr, STEP: gl.constexpr):
    # bits of so many numbers from the beginning of a period
    return size // len(SHIFTS) * STEP + bits_until(size % len(SHIFTS), SHIFTS)


@gluon.constexpr_function
def _segments(length: int) -> int:
    """Return how many segments a line has: `shapes.segments`, which device code cannot call."""
    return max(1, round(length / shapes.SEGMENT))


@gluon.constexpr_function
def _before(lengths: tuple[int, ...], number: int) -> int:
    """Return the segments of all matrices before one."""
    return sum([_segments(length) for length in lengths[:number]])


@gluon.constexpr_function
def _size(length: int) -> int:
    """Return the numbers of a segment, where all of a line have as many, else 0."""
    count = _segments(length)
    return length // count if length % (shapes.UNIT * count) == 0 or count == 1 else 0


@gluon.jit
def _segment(index, LENGTH: gl.constexpr):
    # the first number of a segment, and the numbers that it has; see `shapes.segments`
    COUNT: gl.constexpr = _segments(LENGTH)
    UNITS: gl.constexpr = LENGTH // UNIT
    if _size(LENGTH):
        return index * _size(LENGTH), index * 0 + _size(LENGTH)
    else:
        start = UNIT * (index * UNITS // COUNT)
        return start, gl.where(index == COUNT - 1, LENGTH, UNIT * ((index + 1) * UNITS // COUNT)) - start


@gluon.jit
def _found(codes, scales, segment, LENGTHS: gl.constexpr):
    # the matrix that a segment is of, of several whose numbers follow one another: its codes and scales, the place of
    # its first number; and the segment's first number in it, and how many that has
    words, sizes = codes[0], scales[0]
    begin, numbers = _segment(segment, LENGTHS[0])
    first = begin * 0
    beyond = LENGTHS[0]
    for number in gl.static_range(1, len(LENGTHS)):
        later = segment >= _before(LENGTHS, number)
        start, count = _segment(segment - _before(LENGTHS, number), LENGTHS[number])
        words = gl.where(later, codes[number], words)
        sizes = gl.where(later, scales[number], sizes)
        begin, numbers = gl.where(later, start, begin), gl.where(later, count, numbers)
        first = gl.where(later, beyond, first)
        beyond += LENGTHS[number]
    return words, sizes, first, begin, numbers


@gluon.jit
def _block(codes, scales, block, LENGTHS: gl.constexpr, WORDS: gl.constexpr, SHIFTS: gl.constexpr, STEP: gl.constexpr,
           PARTS: gl.constexpr, HALO: gl.constexpr):
    # where a block is. Of its signs: the words of its segment, its first row in the circle, negative where windows
    # begin behind the seam, the rows of the circle, and how many rows. Of its numbers: the scales, the first in the
    # matrix, the matrix' first in the result, how many
    segment = block // PARTS
    part = block % PARTS
    words, sizes, first, begin, size = _found(codes, scales, segment, LENGTHS)
    periods = (size + len(SHIFTS) - 1) // len(SHIFTS)
    near = part * periods // PARTS
    beyond = gl.minimum((part + 1) * periods // PARTS * len(SHIFTS), size)
    rows = _bits_of(beyond, SHIFTS, STEP) - near * STEP + HALO
    rows = gl.where(segment < _before(LENGTHS, len(LENGTHS)), rows, 0)
    words += (begin // len(SHIFTS) * STEP).to(gl.int64) * WORDS
    signs = words, near * STEP - HALO, _bits_of(size, SHIFTS, STEP), rows
    return signs, (sizes, begin + near * len(SHIFTS), first, beyond - near * len(SHIFTS))


@gluon.jit
def _fetch(ring, stage, signs, tile, step, WORDS: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    # start to copy a step of a tile of M rows to a stage of the ring
    words, first, circle, rows = signs
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 4, 8], [S, 1, 1], [2, 1, 0])
    warp = gl.arange(0, S, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    place = warp * ACROSS + gl.arange(0, ACROSS, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    row = tile * M + gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    inside = (row < rows) & (place >= 0)
    if WORDS % (S * ACROSS) != 0:
        inside = inside & (place + step * (S * ACROSS) < WORDS)
    bit = first + row
    bit = gl.where(bit < 0, bit + circle, bit)
    async_copy.async_copy_global_to_shared(ring.index(stage), words + (bit * WORDS + place + step * (S * ACROSS)),
                                           mask=inside)
    async_copy.commit_group()


@gluon.jit
def _chosen(one, other, later):
    # the other's signs where `later`
    return (gl.where(later, other[0], one[0]), gl.where(later, other[1], one[1]), gl.where(later, other[2], one[2]),
            gl.where(later, other[3], one[3]))


@gluon.jit
def _windows(taps, SHIFTS: gl.constexpr, STEP: gl.constexpr, MEMORY: gl.constexpr, HALO: gl.constexpr,
             NUMBERS: gl.constexpr, AGES: gl.constexpr, S: gl.constexpr):
    # [NUMBERS, AGES] of a block: taps, 0 beyond the window, and which of its rows they weigh
    layout: gl.constexpr = _filtering(AGES, S)
    number = gl.arange(0, NUMBERS, layout=gl.SliceLayout(1, layout))[:, None]
    age = gl.arange(0, AGES, layout=gl.SliceLayout(0, layout))[None, :]
    phase = number % len(SHIFTS)
    inside = (age < MEMORY) & (number >= 0)
    tap = gl.load(taps + phase * MEMORY + age, inside, other=0.0)
    place = number // len(SHIFTS) * STEP + bits_until(phase + 1, SHIFTS) - 1 + HALO - age
    return tap, gl.where(inside, place, 0)


@gluon.jit
def _filtered(parts, tap, place, circle, unit, offset, TILES: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    # the numbers of a block: all warps' sums of its rows, added, gathered as windows see them, weighed
    gl.thread_barrier()
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    shares = parts._reinterpret(gl.float32, [TILES, S, M], layout).load(_shares(M, S))
    rows = gl.sum(shares, 1).reshape([TILES * M]) * unit + offset
    NUMBERS: gl.constexpr = tap.shape[0]
    AGES: gl.constexpr = tap.shape[1]
    where = gl.minimum(gl.where(place < 0, place + circle, place), TILES * M - 1)
    seen = gl.gather(rows, where.reshape([NUMBERS * AGES]), 0).reshape([NUMBERS, AGES])
    return gl.sum(gl.convert_layout(seen, tap.type.layout) * tap, 1)


@kernel
@gluon.jit
def multiply_filtered(x, codes, signs, norm, eps, taps, scales, added, out, LENGTHS: gl.constexpr,
                      WIDTH: gl.constexpr, TOGETHER: gl.constexpr, BYTES: gl.constexpr, ROTATED: gl.constexpr,
                      NORMED: gl.constexpr, ADDS: gl.constexpr, SHIFTS: gl.constexpr, STEP: gl.constexpr,
                      MEMORY: gl.constexpr, PARTS: gl.constexpr, HALO: gl.constexpr, TILES: gl.constexpr,
                      NUMBERS: gl.constexpr, S: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
                      EARLY: gl.constexpr):
    """The product of one vector with matrices of one filter, block after block; S warps share each row of signs.

    Codes and scales are tuples: of one matrix, or of several whose numbers follow one another. The vector is met as
    `multiply_vector` of `codebook_linear` meets it, with `norm` and `added` as there. A block is one of PARTS of a
    segment, with HALO rows before its own: at most TILES times M rows, NUMBERS numbers.
    """
    WORDS: gl.constexpr = WIDTH // SIGN
    STEPS: gl.constexpr = (WORDS + S * ACROSS - 1) // (S * ACROSS)
    BLOCKS: gl.constexpr = PARTS * _before(LENGTHS, len(LENGTHS))
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, S, M, ACROSS], gl.SwizzledSharedLayout(16, 1, 2, [2, 1, 0]))
    parts = gl.allocate_shared_memory(gl.float32, [_power(TILES), S, M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    near, _ = _block(codes, scales, gl.program_id(0), LENGTHS, WORDS, SHIFTS, STEP, PARTS, HALO)
    for first in gl.static_range(EARLY):
        _fetch(ring, first, near, first // STEPS, first % STEPS, WORDS, S, M)
    tap, place = _windows(taps, SHIFTS, STEP, MEMORY, HALO, NUMBERS, _power(MEMORY), S)
    ready, numbers, _, turns = arrive(x, signs, x, signs, norm, WIDTH, 1, FORM, STEPS, TOGETHER, WIDTH, 0, FORM, 0,
                                      TOGETHER, ROTATED, NORMED, S)
    for first in gl.static_range(EARLY, STAGES):
        _fetch(ring, first, near, first // STEPS, first % STEPS, WORDS, S, M)
    planes, _ = digest(ready, x, numbers, x, numbers, turns, eps, WIDTH, 1, FORM, STEPS, TOGETHER, WIDTH, 0, FORM, 0,
                       TOGETHER, BYTES, ROTATED, NORMED, S)
    i = gl.arange(0, NUMBERS, layout=gl.SliceLayout(1, tap.type.layout))
    stage = 0
    for block in range(gl.program_id(0), BLOCKS, gl.num_programs(0)):
        here, mine = _block(codes, scales, block, LENGTHS, WORDS, SHIFTS, STEP, PARTS, HALO)
        later, _unused = _block(codes, scales, block + gl.num_programs(0), LENGTHS, WORDS, SHIFTS, STEP, PARTS, HALO)
        scale = gl.load(mine[0] + mine[1] + i, i < mine[3], other=0.0).to(gl.float32)
        to = mine[2] + mine[1] + i
        if ADDS:
            other = gl.load(added + ready + to, i < mine[3], other=0.0).to(gl.float32)
        for tile in range(TILES):
            sums = no_sums(1, FORM, BYTES, S, M)
            for step in range(STEPS):
                async_copy.wait_group(STAGES - 1)
                words = take_codes(ring, stage, 1, S, M)
                ahead = tile + (step + STAGES) // STEPS
                beyond = ahead >= TILES
                _fetch(ring, stage, _chosen(here, later, beyond), gl.where(beyond, ahead - TILES, ahead),
                       (step + STAGES) % STEPS, WORDS, S, M)
                sums = multiply_planes(sums, words, planes[0], step, 1, FORM, BYTES, TOGETHER, S, M)
                stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            parts.index(tile).store(weigh_planes(sums, (2.0,), 1, FORM, BYTES, S, M))
        y = _filtered(parts, tap, place, here[2], planes[1], -planes[2], _power(TILES), S, M) * scale
        y = y + other if ADDS else y
        gl.store(out + to, y.to(out.dtype.element_ty), i < mine[3])
