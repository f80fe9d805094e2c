"""Attention of few queries over closed tokens whose numbers are filtered signs, in one launch.

Closed tokens are met as in `signed.py`, dense ones as in `nearby.py`, and parts are joined as in `multiplied.py`: a
program takes its queries to planes, and its sums of signs back to coordinates, by itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels.filtering import PLANES, ask_planes, filtered, load_taps, rotate, steps_of
from tersor.ops.kv_attention.kernels.joining import PAD, gathered, is_last, merged, written
from tersor.ops.kv_attention.kernels.nearby import over_nearby
from tersor.ops.kv_attention.kernels.signed import open_turns, over_turns
from tersor.ops.kv_attention.kernels.turning import asked, shared


@gluon.constexpr_function
def asked_words(signs: int, planes: int) -> int:
    """Return the words of a lane's column of so many planes of four queries."""
    return planes // 2 * steps_of(signs)


@gluon.constexpr_function
def words_before(signs: int, planes: int, sets: int) -> int:
    """Return the words of shared memory that queries take: planes, and what belongs to each."""
    return sets * (32 * asked_words(signs, planes) + 12)


@gluon.constexpr_function
def words_of(signs: int, lines: int, planes: int, sets: int, warps: int, pad: int) -> int:
    """Return the words of shared memory of a program: what queries take, and sums to be joined."""
    count = words_before(signs, planes, sets) + 8 * warps + 4 * warps * (lines + pad)
    return -(-count // (32 * warps)) * 32 * warps


@gluon.jit
def ask_all(queries, taps, scaling, start, spare, row, warp, lane, ROWS: gl.constexpr, DIM: gl.constexpr,
            KEYS: gl.constexpr, NEAR: gl.constexpr, SHAPE: gl.constexpr, SETS: gl.constexpr):
    """Return SETS times four queries from `row` on as `over_turns` is given them; `spare` has room for their numbers."""
    own = load_taps(taps, lane, SHAPE)
    shifts = ()
    for turn in gl.static_range(SETS):
        shifts = shifts + (rotate(queries[0], queries[1], queries[2], spare + (turn * 4 + warp) * (DIM * 4),
                                  row + 4 * turn + warp, lane, ROWS, DIM, NEAR[0], NEAR[1]),)
    gl.thread_barrier()
    for turn in gl.static_range(SETS):
        ask_planes(own, spare + (turn * 4 + warp) * (DIM * 4), scaling, shifts[turn], start, warp, lane, turn, DIM, SHAPE,
                   SETS)
    gl.thread_barrier()
    return asked(start, lane, 2.0, asked_words(KEYS, PLANES), SETS)


@gluon.jit
def finish(acc, peak, total, taps, row, at, peaks, totals, sums, start, warp, lane, ROWS: gl.constexpr, DIM: gl.constexpr,
           VALUES: gl.constexpr, SHAPE: gl.constexpr, S: gl.constexpr):
    """Join the warps' sums of signs of four queries and write a part as coordinates; a warp's query is `row`."""
    own = load_taps(taps, lane, SHAPE)
    found, most, whole = gathered(acc, peak, total, start, warp, lane, VALUES, S)
    found = filtered(found, own, start + (8 * S + warp * (VALUES + PAD)) * 4, lane, DIM, SHAPE)
    written(found, most, whole, row, at, peaks, totals, sums, lane, ROWS, DIM)


@gluon.jit
def over_streams(split, splits, at, head, sequence, row, queries, taps, scaling, start, spare, thread, sources, steps, mask,
                 softcap, peaks, totals, sums, middle, batch, early, mask_head, mask_query, mask_token,
                 HEADS: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr,
                 PAGE: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr, KEY_BYTES: gl.constexpr,
                 VALUE_BYTES: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr, NEAR: gl.constexpr,
                 NEAR_TAPS: gl.constexpr, FAR_TAPS: gl.constexpr, SETS: gl.constexpr, S: gl.constexpr):
    """Attend to the turns of closed tokens that are this program's, with queries from `row` on; write a part of each."""
    COUNT: gl.constexpr = VALUES // 8
    lane = thread & 31
    warp = thread >> 5
    opened = open_turns(split, splits, sources, steps, middle, batch, sequence, head, HEADS, BLOCK, PAGE, KEYS, KEY_BYTES, S)
    asked_of = ask_all((queries[0], queries[1], queries[2] + (head * DIM if NEAR[2] else 0)), taps[0], scaling, start, spare,
                       row, warp, lane, ROWS, DIM, KEYS, NEAR, NEAR_TAPS, SETS)
    acc, peak, total = over_turns(opened, asked_of, lane, row, splits, sources, steps, mask, softcap, middle, batch,
                                  sequence, head, early, mask_head, mask_query, mask_token, HEADS, ROWS, QUERIES, BLOCK,
                                  PAGE, KEYS, VALUES, KEY_BYTES, VALUE_BYTES, MASK, CAPPED, SETS, S)
    for turn in gl.static_range(SETS):
        finish(acc[turn * COUNT : (turn + 1) * COUNT], peak[turn], total[turn], taps[1], row + 4 * turn + warp, at, peaks,
               totals, sums, spare, warp, lane, ROWS, DIM, VALUES, FAR_TAPS, S)


@kernel
@gluon.jit(do_not_specialize=["middle", "sinks", "recent", "mask_batch", "mask_head", "mask_query", "mask_token",
                                "splits", "others", "softcap"])
def attend_streams(query, signs, offset, value_signs, value_offset, aux, out, tickets, key_words, value_words, key_pages,
                   value_pages, key_room, value_room, key_taps, value_taps, key_steps, value_steps, sink_keys,
                   sink_values, tail_keys, tail_values, mask, softcap, scaling, peaks, totals, sums, counts, middle,
                   sinks, recent, batch, sink_batch, sink_head, sink_token, tail_batch, tail_head, tail_token,
                   sink_batch_v, sink_head_v, sink_token_v, tail_batch_v, tail_head_v, tail_token_v, mask_batch,
                   mask_head, mask_query, mask_token, splits, others, HEADS: gl.constexpr, ROWS: gl.constexpr,
                   QUERIES: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
                   KEYS: gl.constexpr, VALUES: gl.constexpr, KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr,
                   MASK: gl.constexpr, CAPPED: gl.constexpr, CAUSAL: gl.constexpr, COUNTED: gl.constexpr,
                   NEAR: gl.constexpr, FAR: gl.constexpr, NEAR_TAPS: gl.constexpr, FAR_TAPS: gl.constexpr,
                   AUX: gl.constexpr, SETS: gl.constexpr, S: gl.constexpr):
    """As `attend_octets`, over KEYS and VALUES signs of a token, numbers being what a filter makes of them.

    NEAR_TAPS and FAR_TAPS are the shapes of `key_taps` and of `value_taps`.
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
    start = shared(thread, words_of(KEYS, VALUES, PLANES, SETS, S, PAD), S)
    spare = start + words_before(KEYS, PLANES, SETS) * 4
    if coded:
        over_streams(split, splits, at, head, sequence, row, (query + part * (ROWS * DIM), signs, offset),
                     (key_taps, value_taps), scaling, start, spare, thread,
                     (key_words, value_words, key_pages, value_pages, key_room, value_room), (key_steps, value_steps), mask,
                     softcap, peaks, totals, sums, middle, batch, sinks, mask_head, mask_query, mask_token, HEADS, ROWS,
                     QUERIES, DIM, BLOCK, PAGE, KEYS, VALUES, KEY_BYTES, VALUE_BYTES, MASK, CAPPED, NEAR, NEAR_TAPS,
                     FAR_TAPS, SETS, S)
    else:
        far = sequence.to(gl.int64)
        dense = (sink_keys + (far * sink_batch + head * sink_head), tail_keys + (far * tail_batch + head * tail_head),
                 sink_values + (far * sink_batch_v + head * sink_head_v),
                 tail_values + (far * tail_batch_v + head * tail_head_v))
        for turn in range(0, SETS):
            over_nearby(split, others, at, head, row + 4 * turn, query + part * (ROWS * DIM), dense,
                        (middle, sinks, recent), (sink_token, tail_token, sink_token_v, tail_token_v), value_signs, spare,
                        mask, softcap, scaling, peaks, totals, sums, mask_head, mask_query, mask_token, thread >> 5,
                        thread & 31, ROWS, QUERIES, DIM, MASK, CAPPED, CAUSAL, FAR[0], S)
    if is_last(tickets, part, cuts * gl.num_programs(1), start, thread):
        merged(peaks, totals, sums, value_signs, value_offset, aux, out, part, cuts, splits, thread >> 5, thread & 31,
               HEADS, ROWS, QUERIES, DIM, FAR[0], FAR[1], FAR[2], AUX)
