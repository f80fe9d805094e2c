"""Rows of numbers, a warp each, neighbouring numbers a lane: through signs and a Hadamard matrix, and queries to bytes."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import bits, lookups, octet_ptx
from tersor.ops.kv_attention.kernels.arriving import integers, registers
from tersor.ops.kv_attention.kernels.asking import WHOLE

MOST = gl.constexpr(127.0 * 256)  # a query's largest integer, so that both bytes have signs
BUTTERFLY = gl.constexpr((octet_ptx.butterfly(2), octet_ptx.butterfly(4), octet_ptx.butterfly(8)))
KEPT = gl.constexpr(tuple(octet_ptx.kept(count) for count in (1, 2, 4)))
TAKEN = gl.constexpr(tuple(octet_ptx.taken(count) for count in (1, 2, 4)))
LARGEST_BITS, BEGUN = gl.constexpr(octet_ptx.LARGEST_BITS), gl.constexpr(lookups.BEGUN)
ADDED = gl.constexpr(bits.across("add.f32", 1))
HALF = gl.constexpr("{\n.reg .b16 h, hx;\nmov.b32 {h, hx}, $2;\nst.shared.b16 [$1], h;\nmov.b32 $0, 0;\n}")
SAME = gl.constexpr("{\n.reg .pred wrong;\n.reg .b32 found;\nld.shared.b32 found, [$1];\nsetp.ne.b32 wrong, found, $2;\n"
                    "@wrong trap;\nmov.b32 $0, 0;\n}")


@gluon.constexpr_function
def floats(count: int) -> tuple:
    """Return the dtypes of so many numbers."""
    return (gl.float32,) * count


@gluon.constexpr_function
def divisor(count: int) -> int:
    """Return how many words go at a time: four, two or one."""
    return next(some for some in (4, 2, 1) if count % some == 0)


@gluon.jit
def keep(at, words):
    """Write words of each lane to an address in shared memory, as many at a time as divide their number, four at most."""
    COUNT: gl.constexpr = divisor(len(words))
    for part in gl.static_range(len(words) // COUNT):
        gl.inline_asm_elementwise(KEPT[COUNT // 2], registers(1, 1 + COUNT),
                                  (at + 4 * COUNT * part,) + words[part * COUNT : (part + 1) * COUNT], dtype=gl.int32,
                                  is_pure=False, pack=1)


@gluon.jit
def take(at, COUNT: gl.constexpr):
    """Return words of shared memory as integers, as many at a time as divide their number, four at most."""
    EACH: gl.constexpr = divisor(COUNT)
    found = ()
    for part in gl.static_range(COUNT // EACH):
        some = gl.inline_asm_elementwise(TAKEN[EACH // 2], registers(EACH, 1), [at + 4 * EACH * part],
                                         dtype=integers(EACH), is_pure=False, pack=1)
        for place in gl.static_range(EACH):
            found = found + (some[place],)
    return found


@gluon.jit
def take_float(at):
    """Return a number of shared memory."""
    return take(at, 1)[0].to(gl.float32, bitcast=True)


@gluon.jit
def shared(thread, WORDS: gl.constexpr, S: gl.constexpr):
    """Allocate so many words of shared memory, a multiple of the threads'; return the address at which they begin."""
    memory = gl.allocate_shared_memory(gl.int32, [WORDS // (32 * S), 32 * S], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    memory.index(0).store(thread)
    gl.thread_barrier()
    start = gl.inline_asm_elementwise(BEGUN, "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1)
    gl.inline_asm_elementwise(SAME, registers(1, 2), [start + 4 * thread, thread], dtype=gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()
    return start


@gluon.jit
def turned(row, lane):
    """Return a row times the Hadamard matrix."""
    COUNT: gl.constexpr = len(row)
    return gl.inline_asm_elementwise(BUTTERFLY[COUNT // 4], registers(COUNT, COUNT + 1), row + (lane,),
                                     dtype=floats(COUNT), is_pure=False, pack=1)


@gluon.jit
def coordinates(query, signs, offset, row, lane, ROWS: gl.constexpr, DIM: gl.constexpr, TURNED: gl.constexpr,
                SHIFTED: gl.constexpr):
    """Return a warp's query as coordinates, neighbours a lane, and its product with `offset`; zeros beyond the last."""
    EACH: gl.constexpr = DIM // 32
    inside = row < ROWS
    numbers, shift = (), gl.zeros_like(lane).to(gl.float32)
    for place in gl.static_range(EACH):
        column = lane * EACH + place
        number = gl.load(query + (row * DIM + column), inside, other=0.0).to(gl.float32)
        if SHIFTED:
            shift += number * gl.load(offset + column)
        if TURNED:
            number *= gl.load(signs + column)
        numbers = numbers + (number,)
    if TURNED:
        numbers = turned(numbers, lane)
    if SHIFTED:
        shift = gl.inline_asm_elementwise(ADDED, registers(1, 1), [shift], dtype=gl.float32, is_pure=False, pack=1)
    return numbers, shift


@gluon.jit
def largest_of(numbers):
    """Return the largest magnitude of a warp's numbers, NaN where one is."""
    most = gl.abs(numbers[0]).to(gl.int32, bitcast=True)
    for place in gl.static_range(1, len(numbers)):
        most = gl.maximum(most, gl.abs(numbers[place]).to(gl.int32, bitcast=True))
    most = gl.inline_asm_elementwise(LARGEST_BITS, registers(1, 1), [most], dtype=gl.int32, is_pure=False, pack=1)
    return most.to(gl.float32, bitcast=True)


@gluon.jit
def note(at, begin, unit, shift):
    """Write what a query's sums begin with, an integer of each lane added up, what they count, and are shifted by."""
    keep(at, (gl.inline_asm_elementwise(WHOLE, registers(1, 1), [begin], dtype=gl.int32, is_pure=False, pack=1),))
    keep(at + 4, (unit.to(gl.int32, bitcast=True),))
    keep(at + 8, (shift.to(gl.int32, bitcast=True),))


@gluon.jit
def ask(query, signs, offset, scaling, start, row, warp, lane, turn: gl.constexpr, ROWS: gl.constexpr,
        DIM: gl.constexpr, TURNED: gl.constexpr, SHIFTED: gl.constexpr, SETS: gl.constexpr):
    """Write the bytes of a warp's query to shared memory, and what its sums begin with, count, and are shifted by.

    Bytes lie set by set (step, half, column, quarter, byte), a column being 2 n of the query n, of its higher bytes, or
    2 n + 1, of its lower ones. Three words a query come after them.
    """
    EACH: gl.constexpr = DIM // 32
    numbers, shift = coordinates(query, signs, offset, row, lane, ROWS, DIM, TURNED, SHIFTED)
    largest = largest_of(numbers)
    inverse = MOST / gl.where(largest == 0.0, 1.0, largest)
    begin = gl.zeros_like(lane)
    for word in gl.static_range((EACH + 3) // 4):
        high, low = gl.zeros_like(lane), gl.zeros_like(lane)
        for place in gl.static_range(min(4, EACH)):
            integer = gl.floor(numbers[4 * word + place] * inverse + 0.5).to(gl.int32)
            upper = (integer + 128) >> 8
            begin += integer
            high |= (upper & 255) << (8 * place)
            low |= ((integer - (upper << 8)) & 255) << (8 * place)
        own = lane * EACH // 4 + word
        at = start + (((turn * (DIM // 16) + own % (DIM // 16)) * 32 + warp * 8 + own // (DIM // 16)) * 4 + lane * EACH % 4)
        if EACH >= 4:
            keep(at, (high,))
            keep(at + 16, (low,))
        else:
            gl.inline_asm_elementwise(HALF, registers(1, 2), [at, high], dtype=gl.int32, is_pure=False, pack=1)
            gl.inline_asm_elementwise(HALF, registers(1, 2), [at + 16, low], dtype=gl.int32, is_pure=False, pack=1)
    note(start + (SETS * DIM * 8 + (turn * 4 + warp) * 12), begin, largest / MOST * scaling, shift * scaling)


@gluon.jit
def asked(start, lane, step, WORDS: gl.constexpr, SETS: gl.constexpr):
    """Return the WORDS of a lane's column, set by set, and of its query what sums begin with, count and are shifted by.

    What sums count is for twice the sums, of levels a `step` apart.
    """
    columns, begin, unit, shift = (), (), (), ()
    for place in gl.static_range(SETS * WORDS):
        columns = columns + (take(start + (place * 128 + lane * 4), 1)[0],)
    for turn in gl.static_range(SETS):
        at = start + (SETS * WORDS * 128 + (turn * 4 + (lane & 3)) * 12)
        begin = begin + (take(at, 1)[0],)
        unit = unit + (take_float(at + 4) * (0.5 * step),)
        shift = shift + (take_float(at + 8),)
    return columns, begin, unit, shift
