"""Sums of the warps of a program joined, and those of all programs by the last one that is done."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import bits, octet_ptx
from tersor.ops.kv_attention.kernels.arriving import integers, registers
from tersor.ops.kv_attention.kernels.meeting import LOG2E, NONE, across
from tersor.ops.kv_attention.kernels.turning import keep, take, take_float, turned

ADDED = gl.constexpr(bits.across("add.f32"))
FAR = gl.constexpr(tuple(octet_ptx.far_load(count) for count in (1, 2, 4)))
TICKET, FIRST = gl.constexpr(octet_ptx.TICKET), gl.constexpr("ld.shared.b32 $0, [global_smem];")
PAD = gl.constexpr(8)  # numbers, so that lanes' rows lie in other banks
AT_ONCE = gl.constexpr(16)  # parts


@gluon.jit
def numbers_of(at, COUNT: gl.constexpr):
    """Return numbers that other programs may have written, one, two or four."""
    words = gl.inline_asm_elementwise(FAR[COUNT // 2], registers(COUNT, 0, 1), [at], dtype=integers(COUNT),
                                      is_pure=False, pack=1)
    found = ()
    for place in gl.static_range(COUNT):
        found = found + (words[place].to(gl.float32, bitcast=True),)
    return found


@gluon.jit
def finish(acc, peak, total, first, at, peaks, totals, sums, start, warp, lane, ROWS: gl.constexpr, DIM: gl.constexpr,
           S: gl.constexpr):
    """Join the warps' sums of four queries, from `first` on, and write them; a warp ends with a query, as rows lie.

    Shared memory from `start` on has peaks (4, S) and sums of weights (4, S), then sums (S, 4, DIM + PAD).
    """
    EACH: gl.constexpr = DIM // 32
    quad = lane & 3
    total = across(total, ADDED)
    own = start + (quad * S + warp) * 4
    keep(own, (peak.to(gl.int32, bitcast=True),))
    keep(own + 16 * S, (total.to(gl.int32, bitcast=True),))
    gl.thread_barrier()
    most = gl.full(peak.shape, NONE, gl.float32, peak.type.layout)
    for other in gl.static_range(S):
        most = gl.maximum(most, take_float(start + (quad * S + other) * 4))
    share = gl.exp2(peak - gl.where(most == NONE, 0.0, most))
    near = start + (32 * S + ((warp * 4 + quad) * (DIM + PAD) + (lane >> 2) * 4) * 4)
    for part in gl.static_range(DIM // 32):
        four = ()
        for place in gl.static_range(4):
            four = four + ((acc[4 * part + place] * share).to(gl.int32, bitcast=True),)
        keep(near + part * 128, four)
    gl.thread_barrier()
    most = gl.full(peak.shape, NONE, gl.float32, peak.type.layout)
    for other in gl.static_range(S):
        most = gl.maximum(most, take_float(start + (warp * S + other) * 4))
    base = gl.where(most == NONE, 0.0, most)
    whole = gl.zeros_like(total)
    for other in gl.static_range(S):
        whole += take_float(start + (warp * S + other + 4 * S) * 4) * gl.exp2(
            take_float(start + (warp * S + other) * 4) - base)
    row = first + warp
    inside = row < ROWS
    alone = inside & (lane == 0)
    gl.store(peaks + (at * ROWS + row), most, alone)
    gl.store(totals + (at * ROWS + row), whole, alone)
    found = ()
    for place in gl.static_range(EACH):
        found = found + (gl.zeros_like(total),)
    for other in gl.static_range(S):
        words = take(start + (32 * S + ((other * 4 + warp) * (DIM + PAD) + lane * EACH) * 4), EACH)
        more = ()
        for place in gl.static_range(EACH):
            more = more + (found[place] + words[place].to(gl.float32, bitcast=True),)
        found = more
    for place in gl.static_range(EACH):
        gl.store(sums + ((at * ROWS + row) * DIM + lane * EACH + place), found[place], inside)
    gl.thread_barrier()


@gluon.jit
def is_last(tickets, part, programs, start, thread):
    """Tell whether this is the last of so many programs of a part; what all of them wrote is there then."""
    gl.thread_barrier()
    number = gl.inline_asm_elementwise(TICKET, registers(1, 1, 1), [tickets + (part + thread * 0), thread],
                                       dtype=gl.int32, is_pure=False, pack=1)
    keep(start + gl.where(thread == 0, 0, 4), (number,))
    gl.thread_barrier()
    last = gl.inline_asm_elementwise(FIRST, "=r", [], dtype=gl.int32, is_pure=False, pack=1) == programs - 1
    gl.store(tickets + (part + thread * 0), 0, last & (thread == 0))  # for the next launch
    return last


@gluon.jit
def some_parts(peaks, totals, sums, first, begin, parts, splits, row, lane, state, ROWS: gl.constexpr,
               DIM: gl.constexpr):
    """Return sums, those of codes and those of dense tokens, and their peak and weights, with AT_ONCE parts more."""
    EACH: gl.constexpr = DIM // 32
    peak, total, coded_total, coded, dense = state
    tops, shares, rows = (), (), ()
    for place in gl.static_range(AT_ONCE):
        at = (first + gl.minimum(begin + place, parts - 1)) * ROWS + row
        tops = tops + (gl.where(begin + place < parts, numbers_of(peaks + at, 1)[0], NONE),)
        shares = shares + numbers_of(totals + at, 1)
        rows = rows + (numbers_of(sums + (at * DIM + lane * EACH), EACH),)
    fresh = peak
    for place in gl.static_range(AT_ONCE):
        fresh = gl.maximum(fresh, tops[place])
    base = gl.where(fresh == NONE, 0.0, fresh)
    shrink = gl.exp2(peak - base)
    total, coded_total = total * shrink, coded_total * shrink
    weights = ()
    for place in gl.static_range(AT_ONCE):
        weight = gl.exp2(tops[place] - base)
        near = gl.where(begin + place < splits, weight, 0.0)
        total += shares[place] * weight
        coded_total += shares[place] * near
        weights = weights + ((near, weight - near),)
    found, others = (), ()
    for which in gl.static_range(EACH):
        one, other = coded[which] * shrink, dense[which] * shrink
        for place in gl.static_range(AT_ONCE):
            one += rows[place][which] * weights[place][0]
            other += rows[place][which] * weights[place][1]
        found, others = found + (one,), others + (other,)
    return fresh, total, coded_total, found, others


@gluon.jit
def merge_row(peaks, totals, sums, signs, offset, aux, out, part, row, parts, splits, lane, HEADS: gl.constexpr,
              ROWS: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr, TURNED: gl.constexpr,
              SHIFTED: gl.constexpr, PER_HEAD: gl.constexpr, AUX: gl.constexpr):
    """Write attention (batch, queries, query heads, DIM) of a warp's query from all its parts."""
    EACH: gl.constexpr = DIM // 32
    head = part % HEADS
    sequence = part // HEADS
    group = row // QUERIES
    inside = row < ROWS
    near = gl.minimum(row, ROWS - 1)
    total = gl.zeros_like(lane).to(gl.float32)
    peak = total + NONE
    if AUX:
        peak = gl.load(aux + (head * (ROWS // QUERIES) + near // QUERIES)).to(gl.float32) * LOG2E + total
        total += gl.where(peak == NONE, 0.0, 1.0)
    zeros = ()
    for _ in gl.static_range(EACH):
        zeros = zeros + (gl.zeros_like(total),)
    state = (peak, total, gl.zeros_like(total), zeros, zeros)
    for begin in range(0, parts, AT_ONCE):
        state = some_parts(peaks, totals, sums, part.to(gl.int64) * parts, begin, parts, splits, near, lane, state, ROWS,
                           DIM)
    coded = state[3]
    if TURNED:
        coded = turned(coded, lane)
    inverse = 1.0 / gl.where(state[1] == 0.0, 1.0, state[1])
    first = ((sequence.to(gl.int64) * QUERIES + row % QUERIES) * (HEADS * (ROWS // QUERIES))
             + head * (ROWS // QUERIES) + group) * DIM + lane * EACH
    for place in gl.static_range(EACH):
        number = coded[place]
        if TURNED:
            number *= gl.load(signs + (lane * EACH + place))
        number += state[4][place]
        if SHIFTED:
            number += state[2] * gl.load(offset + ((head * DIM if PER_HEAD else 0) + lane * EACH + place))
        gl.store(out + first + place, (number * inverse).to(out.dtype.element_ty), inside)


@gluon.jit
def merged(peaks, totals, sums, signs, offset, aux, out, part, parts, splits, warp, lane, HEADS: gl.constexpr,
           ROWS: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr, TURNED: gl.constexpr, SHIFTED: gl.constexpr,
           PER_HEAD: gl.constexpr, AUX: gl.constexpr):
    """Write attention of all queries of a part, a warp each at a time."""
    for turn in range(0, ROWS, 4):
        merge_row(peaks, totals, sums, signs, offset, aux, out, part, turn + warp, parts, splits, lane, HEADS, ROWS,
                  QUERIES, DIM, TURNED, SHIFTED, PER_HEAD, AUX)
