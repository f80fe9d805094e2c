"""Sums of the warps of a program joined, and those of all programs by the last one that is done."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import bits, lookups, octet_ptx
from tersor.ops.kv_attention.kernels.arriving import integers, registers
from tersor.ops.kv_attention.kernels.meeting import LOG2E, NONE, across
from tersor.ops.kv_attention.kernels.turning import keep, take, take_float, turned

ADDED = gl.constexpr(bits.across("add.f32"))
FAR = gl.constexpr(tuple(octet_ptx.far_load(count) for count in (1, 2, 4)))
TICKET, FIRST = gl.constexpr(octet_ptx.TICKET), gl.constexpr("ld.shared.b32 $0, [global_smem];")
MOST, WHOLE = gl.constexpr(bits.across("max.NaN.f32", 1)), gl.constexpr(bits.across("add.f32", 1))
FROM = gl.constexpr(lookups.FROM)
PAD = gl.constexpr(8)  # numbers, so that lanes' rows lie in other banks


@gluon.jit
def numbers_of(at, COUNT: gl.constexpr):
    """Return numbers that other programs may have written, one, two, four or eight."""
    EACH: gl.constexpr = min(4, COUNT)
    found = ()
    for part in gl.static_range(COUNT // EACH):
        words = gl.inline_asm_elementwise(FAR[EACH // 2], registers(EACH, 0, 1), [at + EACH * part],
                                          dtype=integers(EACH), is_pure=False, pack=1)
        for place in gl.static_range(EACH):
            found = found + (words[place].to(gl.float32, bitcast=True),)
    return found


@gluon.constexpr_function
def at_once(dim: int) -> int:
    """Return how many parts a warp joins together: registers hold their rows."""
    return 32 if dim <= 128 else 16


@gluon.jit
def shares(peak, total, start, warp, quad, S: gl.constexpr):
    """Write a warp's peaks and sums of weights to shared memory; return what its sums count in the program's.

    Shared memory from `start` on has peaks (4, S) and sums of weights (4, S), then sums (S, 4, DIM + PAD).
    """
    own = start + (quad * S + warp) * 4
    keep(own, (peak.to(gl.int32, bitcast=True),))
    keep(own + 16 * S, (across(total, ADDED).to(gl.int32, bitcast=True),))
    gl.thread_barrier()
    most = gl.full(peak.shape, NONE, gl.float32, peak.type.layout)
    for other in gl.static_range(S):
        most = gl.maximum(most, take_float(start + (quad * S + other) * 4))
    return gl.exp2(peak - gl.where(most == NONE, 0.0, most))


@gluon.jit
def joined(start, warp, lane, DIM: gl.constexpr, S: gl.constexpr):
    """Return a warp's query as rows lie: the sums of all warps, their peak and sum of weights."""
    EACH: gl.constexpr = DIM // 32
    gl.thread_barrier()
    tops, totals = (), ()
    for other in gl.static_range(S):
        tops = tops + (take_float(start + (warp * S + other) * 4),)
        totals = totals + (take_float(start + (warp * S + other + 4 * S) * 4),)
    most = tops[0]
    for other in gl.static_range(1, S):
        most = gl.maximum(most, tops[other])
    base = gl.where(most == NONE, 0.0, most)
    whole = gl.zeros_like(most)
    for other in gl.static_range(S):
        whole += totals[other] * gl.exp2(tops[other] - base)
    found = ()
    for _ in gl.static_range(EACH):
        found = found + (gl.zeros_like(most),)
    for other in gl.static_range(S):
        words = take(start + (32 * S + ((other * 4 + warp) * (DIM + PAD) + lane * EACH) * 4), EACH)
        more = ()
        for place in gl.static_range(EACH):
            more = more + (found[place] + words[place].to(gl.float32, bitcast=True),)
        found = more
    gl.thread_barrier()
    return found, most, whole


@gluon.jit
def written(row_sums, most, whole, row, at, peaks, totals, sums, lane, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Write a part of a query: sums, their peak, and the sum of weights."""
    EACH: gl.constexpr = DIM // 32
    inside = row < ROWS
    gl.store(peaks + (at * ROWS + row), most, inside & (lane == 0))
    gl.store(totals + (at * ROWS + row), whole, inside & (lane == 0))
    for place in gl.static_range(EACH):
        gl.store(sums + ((at * ROWS + row) * DIM + lane * EACH + place), row_sums[place], inside)


@gluon.jit
def gathered(acc, peak, total, start, warp, lane, DIM: gl.constexpr, S: gl.constexpr):
    """Join the warps' sums of four queries, four numbers of each 32 a lane; return a warp's query as `joined` does."""
    quad = lane & 3
    share = shares(peak, total, start, warp, quad, S)
    near = start + (32 * S + ((warp * 4 + quad) * (DIM + PAD) + (lane >> 2) * 4) * 4)
    for part in gl.static_range(DIM // 32):
        four = ()
        for place in gl.static_range(4):
            four = four + ((acc[4 * part + place] * share).to(gl.int32, bitcast=True),)
        keep(near + part * 128, four)
    return joined(start, warp, lane, DIM, S)


@gluon.jit
def finish(acc, peak, total, row, at, peaks, totals, sums, start, warp, lane, ROWS: gl.constexpr, DIM: gl.constexpr,
           S: gl.constexpr):
    """Join the warps' sums of four queries and write a part; a warp's query is `row`."""
    found, most, whole = gathered(acc, peak, total, start, warp, lane, DIM, S)
    written(found, most, whole, row, at, peaks, totals, sums, lane, ROWS, DIM)


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
    """Return sums, their peak, and a lane's sums of weights, those of codes and all, with some parts more."""
    EACH: gl.constexpr = DIM // 32
    AT_ONCE: gl.constexpr = at_once(DIM)
    peak, total, coded, acc = state
    own = begin + lane
    at = (first + gl.minimum(own, parts - 1)) * ROWS + row
    top, share = numbers_of(peaks + at, 1)[0], numbers_of(totals + at, 1)[0]
    rows = ()
    for place in gl.static_range(AT_ONCE):
        at = (first + gl.minimum(begin + place, parts - 1)) * ROWS + row
        rows = rows + (numbers_of(sums + (at * DIM + lane * EACH), EACH),)
    top = gl.where((own < parts) & (lane < AT_ONCE), top, NONE)
    fresh = gl.maximum(peak, gl.inline_asm_elementwise(MOST, registers(1, 1), [top], dtype=gl.float32, is_pure=False,
                                                       pack=1))
    base = gl.where(fresh == NONE, 0.0, fresh)
    shrink = gl.exp2(peak - base)
    weight = gl.exp2(top - base)
    share = share * weight
    total, coded = total * shrink + share, coded * shrink + gl.where(own < splits, share, 0.0)
    found = ()
    for which in gl.static_range(EACH):
        found = found + (acc[which] * shrink,)
    for place in gl.static_range(AT_ONCE):
        one = gl.inline_asm_elementwise(FROM, registers(1, 2), [weight, lane * 0 + place], dtype=gl.float32,
                                        is_pure=False, pack=1)
        more = ()
        for which in gl.static_range(EACH):
            more = more + (found[which] + rows[place][which] * one,)
        found = more
    return fresh, total, coded, found


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
    acc = ()
    for _ in gl.static_range(EACH):
        acc = acc + (gl.zeros_like(total),)
    state = (peak, gl.where(lane == 0, total, 0.0), gl.zeros_like(total), acc)
    for begin in range(0, parts, at_once(DIM)):
        state = some_parts(peaks, totals, sums, part.to(gl.int64) * parts, begin, parts, splits, near, lane, state, ROWS,
                           DIM)
    total = gl.inline_asm_elementwise(WHOLE, registers(1, 1), [state[1]], dtype=gl.float32, is_pure=False, pack=1)
    acc = state[3]
    if TURNED:
        acc = turned(acc, lane)
    if SHIFTED:
        coded = gl.inline_asm_elementwise(WHOLE, registers(1, 1), [state[2]], dtype=gl.float32, is_pure=False, pack=1)
    inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
    first = ((sequence.to(gl.int64) * QUERIES + row % QUERIES) * (HEADS * (ROWS // QUERIES))
             + head * (ROWS // QUERIES) + group) * DIM + lane * EACH
    for place in gl.static_range(EACH):
        number = acc[place]
        if TURNED:
            number *= gl.load(signs + (lane * EACH + place))
        if SHIFTED:
            number += coded * gl.load(offset + ((head * DIM if PER_HEAD else 0) + lane * EACH + place))
        gl.store(out + first + place, (number * inverse).to(out.dtype.element_ty), inside)


@gluon.jit
def merged(peaks, totals, sums, signs, offset, aux, out, part, parts, splits, warp, lane, HEADS: gl.constexpr,
           ROWS: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr, TURNED: gl.constexpr, SHIFTED: gl.constexpr,
           PER_HEAD: gl.constexpr, AUX: gl.constexpr):
    """Write attention of all queries of a part, a warp each at a time."""
    for turn in range(0, ROWS, 4):
        merge_row(peaks, totals, sums, signs, offset, aux, out, part, turn + warp, parts, splits, lane, HEADS, ROWS,
                  QUERIES, DIM, TURNED, SHIFTED, PER_HEAD, AUX)
