"""Attention of few queries over closed tokens whose codes are integers of 8 bits; dense tokens as in `attending.py`.

A warp takes turns of 64 tokens or more by itself. Codes become operands of the tensor cores four at a time, queries and
weights are integers of two bytes: a column of a product each.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels.arriving import place_of
from tersor.ops.kv_attention.kernels.joining import ADDED, PAD, finish, is_last, merged
from tersor.ops.kv_attention.kernels.meeting import NONE, across
from tersor.ops.kv_attention.kernels.nearby import over_nearby
from tersor.ops.kv_attention.kernels.octets import (
    RUN,
    UNIT,
    added,
    load_keys,
    load_scales,
    load_values,
    masked,
    of_set,
    scored,
    weighed,
)
from tersor.ops.kv_attention.kernels.signed import filled
from tersor.ops.kv_attention.kernels.turning import ask, asked, shared


@gluon.jit
def load_table(table, like, BITS: gl.constexpr):
    """Return the integers of levels in each lane's own registers."""
    found = (gl.load(table + like * 0),)
    if BITS == 4:
        found = found + (gl.load(table + (like * 0 + 1)),)
    return found


@gluon.jit
def load_turn(sources, far, start, first, middle, head, lane, steps, HEADS: gl.constexpr, BLOCK: gl.constexpr,
              PAGE: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr, KEY_BYTES: gl.constexpr, UNITS: gl.constexpr):
    """Return keys and their scales, unit by unit, of the turn at `start` that reads tokens from `first` on."""
    keys, scales = (), ()
    for unit in gl.static_range(UNITS):
        own = unit * UNIT + (lane >> 2) * RUN
        keys = keys + (load_keys(sources[0], far, first + own, head, lane & 3, HEADS, BLOCK, PAGE, DIM, KEYS),)
        scales = scales + (load_scales(sources[0], sources[4], far, first + own, head, start + own < middle, steps, HEADS,
                                       BLOCK, PAGE, KEY_BYTES),)
    return keys, scales


@gluon.jit
def load_others(sources, far, start, first, middle, head, lane, steps, HEADS: gl.constexpr, BLOCK: gl.constexpr,
                PAGE: gl.constexpr, DIM: gl.constexpr, VALUES: gl.constexpr, VALUE_BYTES: gl.constexpr,
                UNITS: gl.constexpr):
    """Return values, unit by unit, and all their scales, of the turn at `start` that reads tokens from `first` on."""
    values, scales = (), ()
    for unit in gl.static_range(UNITS):
        own = unit * UNIT + (lane >> 2) * RUN
        values = values + (load_values(sources[1], far, first + (unit * UNIT + (lane & 3) * (2 * RUN)), head, lane >> 2,
                                       HEADS, BLOCK, PAGE, DIM, VALUES),)
        scales = scales + load_scales(sources[1], sources[5], far, first + own, head, start + own < middle, steps, HEADS,
                                      BLOCK, PAGE, VALUE_BYTES)
    return values, scales


@gluon.jit
def weighed_all(every, scales, peaks, totals, extras):
    """Return columns of weights, their units, shrinkage, and the new peaks and sums, of each four queries."""
    given, sizes, shrinks, fresh, sum_of, more = (), (), (), (), (), ()
    for turn in gl.static_range(len(every)):
        some, size, shrink, most, whole, weighted = weighed(every[turn], scales, peaks[turn], totals[turn], extras[turn])
        given, sizes, shrinks = given + some, sizes + (size,), shrinks + (shrink,)
        fresh, sum_of, more = fresh + (most,), sum_of + (whole,), more + (weighted,)
    return given, sizes, shrinks, fresh, sum_of, more


@gluon.jit
def levels_of(sums, extra, step):
    """Return sums of levels, `step (m + 1/2)` each, from those of integers and of weights."""
    half = across(extra, ADDED) * (0.5 * step)
    found = ()
    for place in gl.static_range(len(sums)):
        found = found + (sums[place] * step + half,)
    return found


@gluon.jit
def over_octets(split, splits, at, head, sequence, row, queries, start, sources, tables, steps, scaling, mask, softcap, peaks, totals, sums,
                middle, batch, early, mask_head, mask_query, mask_token, HEADS: gl.constexpr, ROWS: gl.constexpr,
                QUERIES: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr,
                VALUES: gl.constexpr, KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr, MASK: gl.constexpr,
                CAPPED: gl.constexpr, NEAR: gl.constexpr, UNITS: gl.constexpr,
                SETS: gl.constexpr, S: gl.constexpr):
    """Attend to the turns of closed tokens that are this program's, with queries from `row` on.

    KEYS and VALUES are bits of a code; `tables` are integers and steps of levels, of keys, then of values.
    """
    TURN: gl.constexpr = UNITS * UNIT
    COUNT: gl.constexpr = DIM // 8
    thread = gl.arange(0, 32 * S, layout=gl.BlockedLayout([1], [32], [S], [0]))
    lane = thread & 31
    warp = thread >> 5
    quad = lane & 3
    group = lane >> 2
    at_token = (split * S + warp) * TURN
    first = gl.where(at_token < middle, at_token, 0)  # turns that are none read the first one's
    keys, key_scales = load_turn(sources, place_of(sources[2], first, batch, sequence, BLOCK, PAGE), at_token, first, middle,
                                 head, lane, steps[0], HEADS, BLOCK, PAGE, DIM, KEYS, KEY_BYTES, UNITS)
    far = place_of(sources[3], first, batch, sequence, BLOCK, PAGE)
    key_table, value_table = load_table(tables[0], lane, KEYS), load_table(tables[1], lane, VALUES)
    for turn in gl.static_range(SETS):
        ask(queries[0] + (sequence * HEADS + head) * (ROWS * DIM), queries[1],
            queries[2] + (head * DIM if NEAR[2] else 0), scaling, start, row + 4 * turn + warp, warp, lane, turn, ROWS, DIM,
            NEAR[0], NEAR[1], SETS)
    gl.thread_barrier()
    columns, begin, unit, shift = asked(start, lane, tables[2], DIM // 16, SETS)
    peak, total, extra = filled(NONE, unit[0], SETS), filled(0.0, unit[0], SETS), filled(0.0, unit[0], SETS)
    acc = filled(0.0, unit[0], SETS * COUNT)
    for _ in range(0, ((middle + TURN - 1) // TURN + splits * S - 1) // (splits * S)):
        values, value_scales = load_others(sources, far, at_token, first, middle, head, lane, steps[1], HEADS, BLOCK, PAGE,
                                           DIM, VALUES, VALUE_BYTES, UNITS)
        placed, inside = (), ()
        for unit_of in gl.static_range(UNITS):
            own = unit_of * UNIT + group * RUN
            placed, inside = placed + (early + first + own,), inside + (at_token + own < middle,)
        at_token += splits * (S * TURN)
        first = gl.where(at_token < middle, at_token, 0)
        near = place_of(sources[2], first, batch, sequence, BLOCK, PAGE)
        far = place_of(sources[3], first, batch, sequence, BLOCK, PAGE)
        scores = ()
        for unit_of in gl.static_range(UNITS):
            scores = scores + scored(keys[unit_of], key_table, columns, begin, unit, shift,
                                     gl.where(inside[unit_of], 0.0, NONE), key_scales[unit_of], softcap, DIM, KEYS, SETS,
                                     CAPPED)
        keys, key_scales = load_turn(sources, near, at_token, first, middle, head, lane, steps[0], HEADS, BLOCK, PAGE, DIM,
                                     KEYS, KEY_BYTES, UNITS)
        every = ()
        for turn in gl.static_range(SETS):
            every = every + (masked(of_set(scores, turn, SETS), mask, placed, inside, row + 4 * turn + quad, head, mask_head,
                                    mask_query, mask_token, ROWS, QUERIES, MASK),)
        given, sizes, shrinks, peak, total, extra = weighed_all(every, value_scales, peak, total, extra)
        acc = added(acc, values, value_table, given, sizes, shrinks, DIM, VALUES)
    for turn in gl.static_range(SETS):
        levels = levels_of(acc[turn * COUNT : (turn + 1) * COUNT], extra[turn], tables[3])
        finish(levels, peak[turn], total[turn], row + 4 * turn + warp, at, peaks, totals, sums,
               start + (SETS * DIM * 8 + SETS * 48), warp, lane, ROWS, DIM, S)


@gluon.constexpr_function
def words_of(dim: int, sets: int, warps: int, pad: int) -> int:
    """Return the words of shared memory of a program: bytes of queries, what belongs to each, and sums to be joined."""
    count = 2 * sets * dim + 12 * sets + 8 * warps + 4 * warps * (dim + pad)
    return -(-count // (32 * warps)) * 32 * warps


@kernel
@gluon.jit(do_not_specialize=["middle", "sinks", "recent", "mask_batch", "mask_head", "mask_query", "mask_token",
                                "splits", "others", "softcap"])
def attend_octets(query, signs, offset, value_signs, value_offset, aux, out, tickets, key_words, value_words, key_pages,
                  value_pages, key_room, value_room, key_table, value_table, key_step, value_step, key_steps,
                  value_steps, sink_keys, sink_values, tail_keys, tail_values, mask, softcap, scaling, peaks, totals,
                  sums, counts, middle, sinks, recent, batch, sink_batch, sink_head, sink_token, tail_batch, tail_head,
                  tail_token, sink_batch_v, sink_head_v, sink_token_v, tail_batch_v, tail_head_v, tail_token_v,
                  mask_batch, mask_head, mask_query, mask_token, splits, others, HEADS: gl.constexpr, ROWS: gl.constexpr,
                  QUERIES: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
                  KEYS: gl.constexpr, VALUES: gl.constexpr, KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr,
                  MASK: gl.constexpr, CAPPED: gl.constexpr, CAUSAL: gl.constexpr, COUNTED: gl.constexpr,
                  NEAR: gl.constexpr, FAR: gl.constexpr, AUX: gl.constexpr, UNITS: gl.constexpr, SETS: gl.constexpr,
                  S: gl.constexpr):
    """Write attention (batch, queries, query heads, DIM): parts as in `attend`, which the last program joins.

    KEYS and VALUES are bits of a code, with scales of so many bytes. NEAR and FAR tell of keys and of values whether
    coordinates are turned, by `signs` and a Hadamard matrix, whether something is added, and whether to each head something
    else. Programs of the third axis have other queries, SETS times four. `tickets` are zeros, one a part, and are left so.
    """
    parts = batch * HEADS
    cuts = splits + others
    number = gl.program_id(0)  # those over codes come first: they are longer
    coded = number < splits * parts
    number = gl.where(coded, number, number - splits * parts)
    share = gl.where(coded, splits, others)
    part = number // share
    split = number % share
    sequence = part // HEADS
    head = part % HEADS
    at = part.to(gl.int64) * cuts + gl.where(coded, split, split + splits)
    row = gl.program_id(1) * (4 * SETS)
    if COUNTED:
        middle = gl.load(counts)
        sinks = gl.load(counts + 1)
        recent = gl.load(counts + 2)
    mask += sequence.to(gl.int64) * mask_batch
    thread = gl.arange(0, 32 * S, layout=gl.BlockedLayout([1], [32], [S], [0]))
    start = shared(thread, words_of(DIM, SETS, S, PAD), S)
    if coded:
        sources = (key_words, value_words, key_pages, value_pages, key_room, value_room)
        over_octets(split, splits, at, head, sequence, row, (query, signs, offset), start, sources,
                    (key_table, value_table, key_step, value_step), (key_steps, value_steps), scaling, mask, softcap, peaks, totals, sums, middle, batch, sinks,
                    mask_head, mask_query, mask_token, HEADS, ROWS, QUERIES, DIM, BLOCK, PAGE, KEYS, VALUES, KEY_BYTES,
                    VALUE_BYTES, MASK, CAPPED, NEAR, UNITS, SETS, S)
    else:
        far = sequence.to(gl.int64)
        dense = (sink_keys + (far * sink_batch + head * sink_head), tail_keys + (far * tail_batch + head * tail_head),
                 sink_values + (far * sink_batch_v + head * sink_head_v),
                 tail_values + (far * tail_batch_v + head * tail_head_v))
        for turn in range(0, SETS):
            over_nearby(split, others, at, head, row + 4 * turn, query + part * (ROWS * DIM), dense,
                        (middle, sinks, recent), (sink_token, tail_token, sink_token_v, tail_token_v), value_signs,
                        start + (SETS * DIM * 8 + SETS * 48), mask, softcap, scaling, peaks, totals, sums, mask_head,
                        mask_query, mask_token, thread >> 5, thread & 31, ROWS, QUERIES, DIM, MASK, CAPPED, CAUSAL, FAR[0],
                        S)
    if is_last(tickets, part, cuts * gl.num_programs(1), start, thread):
        merged(peaks, totals, sums, value_signs, value_offset, aux, out, part, cuts, splits, thread >> 5, thread & 31,
               HEADS, ROWS, QUERIES, DIM, FAR[0], FAR[1], FAR[2], AUX)
