"""Attention of few queries over closed tokens whose codes are signs; dense tokens as in `attending.py`.

A warp takes turns of 128 tokens by itself. Keys are rows of bits; values lie turned, 32 tokens a word, so that both
meet integers on the binary tensor cores as they lie in memory, and nothing is decoded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels import bits
from tersor.ops.kv_attention.kernels.arriving import line_of, load_scales, load_turn, load_values, place_of
from tersor.ops.kv_attention.kernels.attending import over_dense, waited
from tersor.ops.kv_attention.kernels.meeting import added, finish, masked, planes_of, scored, weighed

NONE = gl.constexpr(float("-inf"))
TILES = gl.constexpr(bits.ASKED_TILES)
TURN = gl.constexpr(bits.TOKENS)
EACH = gl.constexpr(bits.EACH)


@gluon.jit
def load_queries(near, begins, units, shifts, part, first, lane, STEPS: gl.constexpr, SETS: gl.constexpr,
                 ALL: gl.constexpr):
    """Return the planes of a lane's column, and of its query what sums begin with, count, and are shifted by.

    Queries from `first` on, SETS times four, of ALL times four.
    """
    planes = ()
    for place in gl.static_range(SETS * TILES * STEPS):
        planes = planes + (gl.load(near + (((part * ALL + first // 4) * (TILES * STEPS) + place) * 32 + lane)),)
    begin, unit, shift = (), (), ()
    for turn in gl.static_range(SETS):
        row = first + 4 * turn + (lane & 3)
        opening = gl.zeros_like(lane)
        for word in gl.static_range(4 * STEPS):
            opening = opening + gl.load(begins + ((part * (4 * STEPS) + word) * (4 * ALL) + row))
        begin = begin + (opening,)
        unit = unit + (gl.load(units + (part * (4 * ALL) + row)),)
        shift = shift + (gl.load(shifts + (part * (4 * ALL) + row)),)
    return planes, begin, unit, shift


@gluon.jit
def filled(value, like, COUNT: gl.constexpr):
    """Return COUNT tensors of one number a lane."""
    found = ()
    for _ in gl.static_range(COUNT):
        found = found + (gl.full(like.shape, value, gl.float32, like.type.layout),)
    return found


@gluon.jit
def weighed_all(every, value_scales, peaks, totals, lane, SETS: gl.constexpr):
    """Return planes of weights, their sums, units and shrinkage, then the new peaks and sums, of each four queries."""
    columns, weights, sizes_of, shrinks, fresh, sum_of = (), (), (), (), (), ()
    for turn in gl.static_range(SETS):
        numbers, size, shrink, most, whole = weighed(every[EACH * turn : EACH * (turn + 1)], value_scales, peaks[turn],
                                                     totals[turn])
        some, sum_of_some = planes_of(numbers, lane)
        columns, weights, sizes_of = columns + some, weights + (sum_of_some,), sizes_of + (size,)
        shrinks, fresh, sum_of = shrinks + (shrink,), fresh + (most,), sum_of + (whole,)
    return columns, weights, sizes_of, shrinks, fresh, sum_of


@gluon.jit
def open_turns(split, splits, sources, steps, middle, batch, sequence, head, HEADS: gl.constexpr, BLOCK: gl.constexpr,
               PAGE: gl.constexpr, KEYS: gl.constexpr, KEY_BYTES: gl.constexpr, S: gl.constexpr):
    """Ask for the first turn of a program's warps; return what `over_turns` begins with."""
    thread = gl.arange(0, 32 * S, layout=gl.BlockedLayout([1], [32], [S], [0]))
    lane = thread & 31
    start = (split * S + (thread >> 5)) * TURN
    first = gl.where(start < middle, start, 0)  # turns that are none read the first one's
    inside = start + (lane >> 2) * EACH < middle
    keys, key_scales = load_turn(sources, place_of(sources[2], first, batch, sequence, BLOCK, PAGE), first, inside, head,
                                 lane, steps[0], HEADS, BLOCK, PAGE, KEYS, KEY_BYTES)
    return start, first, inside, keys, key_scales, place_of(sources[3], first, batch, sequence, BLOCK, PAGE)


@gluon.jit
def over_turns(opened, asked, lane, row, splits, sources, steps, mask, softcap, middle, batch, sequence, head, early,
               mask_head, mask_query, mask_token, HEADS: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr,
               BLOCK: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr,
               KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr,
               SETS: gl.constexpr, S: gl.constexpr):
    """Return sums of signs of a warp's turns, SETS times four queries from `row` on, then peaks and sums of weights.

    `asked` are planes of queries, and what their sums begin with, count, and are shifted by. KEYS and VALUES are signs of
    a token.
    """
    start, first, inside, keys, key_scales, far = opened
    planes, begin, unit, shift = asked
    WORDS: gl.constexpr = len(planes) // SETS
    peak = filled(NONE, unit[0], SETS)
    total = filled(0.0, unit[0], SETS)
    acc = filled(0.0, unit[0], SETS * (VALUES // 8))
    for _ in range(0, ((middle + TURN - 1) // TURN + splits * S - 1) // (splits * S)):
        values = load_values(sources[1], far, first, head, lane, HEADS, BLOCK, PAGE, VALUES)
        token = first + (lane >> 2) * EACH
        place = line_of(token, head, HEADS, BLOCK, PAGE) * BLOCK + (token & (BLOCK - 1))
        value_scales = load_scales(sources[1], sources[5], far, place, inside, steps[1], VALUE_BYTES)
        bias = gl.where(inside, 0.0, NONE)
        start += splits * (S * TURN)
        first = gl.where(start < middle, start, 0)
        near = place_of(sources[2], first, batch, sequence, BLOCK, PAGE)
        far = place_of(sources[3], first, batch, sequence, BLOCK, PAGE)
        every = ()
        for turn in gl.static_range(SETS):
            scores = scored(keys, planes[turn * WORDS : (turn + 1) * WORDS], begin[turn], unit[turn], shift[turn], bias,
                            key_scales, softcap, KEYS // 32, CAPPED)
            every = every + masked(scores, mask, early + token, inside, row + 4 * turn + (lane & 3), head, mask_head,
                                   mask_query, mask_token, ROWS, QUERIES, MASK)
        inside = start + (lane >> 2) * EACH < middle
        keys, key_scales = load_turn(sources, near, first, inside, head, lane, steps[0], HEADS, BLOCK, PAGE, KEYS,
                                     KEY_BYTES)
        columns, weights, unit_of, shrink, peak, total = weighed_all(every, value_scales, peak, total, lane, SETS)
        acc = added(acc, values, columns, weights, unit_of, shrink, VALUES)
    return acc, peak, total


@gluon.jit
def over_signs(split, splits, at, head, sequence, row, asked, sources, steps, mask, softcap, peaks, totals, sums, middle,
               batch, early, mask_head, mask_query, mask_token, HEADS: gl.constexpr, ROWS: gl.constexpr,
               QUERIES: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr,
               KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr, WIDE: gl.constexpr, MASK: gl.constexpr,
               CAPPED: gl.constexpr, SETS: gl.constexpr, ALL: gl.constexpr, S: gl.constexpr):
    """Attend to the turns of closed tokens that are this program's, with queries from `row` on.

    KEYS and VALUES are signs of a token.
    """
    COUNT: gl.constexpr = VALUES // 8
    lane = gl.arange(0, 32 * S, layout=gl.BlockedLayout([1], [32], [S], [0])) & 31
    opened = open_turns(split, splits, sources, steps, middle, batch, sequence, head, HEADS, BLOCK, PAGE, KEYS, KEY_BYTES, S)
    queries = load_queries(asked[0], asked[1], asked[2], asked[3], sequence * HEADS + head + waited(), row, lane,
                           (KEYS // 32 + 3) // 4, SETS, ALL)
    acc, peak, total = over_turns(opened, queries, lane, row, splits, sources, steps, mask, softcap, middle, batch,
                                  sequence, head, early, mask_head, mask_query, mask_token, HEADS, ROWS, QUERIES, BLOCK,
                                  PAGE, KEYS, VALUES, KEY_BYTES, VALUE_BYTES, MASK, CAPPED, SETS, S)
    for turn in gl.static_range(SETS):
        finish(acc[turn * COUNT : (turn + 1) * COUNT], peak[turn], total[turn], row + 4 * turn, at, peaks, totals, sums,
               ROWS, WIDE, VALUES, S)


@kernel
@gluon.jit(do_not_specialize=["middle", "sinks", "recent", "mask_batch", "mask_head", "mask_query", "mask_token",
                                "splits", "softcap"])
def attend_signs(query, near, begins, units, shifts, key_words, value_words, key_pages, value_pages, key_room, value_room,
                 key_steps, value_steps, sink_keys, sink_values, tail_keys, tail_values, mask, softcap, scaling, peaks,
                 totals, sums, counts, middle, sinks, recent, batch, sink_batch, sink_head, sink_token, tail_batch,
                 tail_head, tail_token, sink_batch_v, sink_head_v, sink_token_v, tail_batch_v, tail_head_v, tail_token_v,
                 mask_batch, mask_head, mask_query, mask_token, splits, HEADS: gl.constexpr, ROWS: gl.constexpr,
                 QUERIES: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr,
                 VALUES: gl.constexpr, KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr, WIDE: gl.constexpr,
                 MASK: gl.constexpr, CAPPED: gl.constexpr, CAUSAL: gl.constexpr, COUNTED: gl.constexpr,
                 SETS: gl.constexpr, ALL: gl.constexpr, R: gl.constexpr, N_DENSE: gl.constexpr, S: gl.constexpr):
    """As `attend`, over signs: KEYS and VALUES of a token, with scales of so many bytes.

    Programs of the third axis have other queries, SETS times four of ALL times four.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    split = gl.program_id(0)
    part = gl.program_id(1)
    sequence = part // HEADS
    head = part % HEADS
    at = part.to(gl.int64) * gl.num_programs(0) + split
    if COUNTED:
        middle = gl.load(counts)
        sinks = gl.load(counts + 1)
        recent = gl.load(counts + 2)
    mask += sequence.to(gl.int64) * mask_batch
    sources = (key_words, value_words, key_pages, value_pages, key_room, value_room)
    if split < splits:
        over_signs(split, splits, at, head, sequence, gl.program_id(2) * (4 * SETS), (near, begins, units, shifts), sources, (key_steps, value_steps),
                   mask, softcap, peaks, totals, sums, middle, batch, sinks, mask_head, mask_query, mask_token, HEADS,
                   ROWS, QUERIES, BLOCK, PAGE, KEYS, VALUES, KEY_BYTES, VALUE_BYTES, WIDE, MASK, CAPPED, SETS, ALL, S)
    elif gl.program_id(2) == 0:
        strides = (sink_batch, sink_head, sink_token, tail_batch, tail_head, tail_token, sink_batch_v, sink_head_v,
                   sink_token_v, tail_batch_v, tail_head_v, tail_token_v)
        over_dense(split - splits, at, head, sequence, query, sink_keys, sink_values, tail_keys, tail_values, mask,
                   softcap, scaling, peaks, totals, sums, middle, sinks, recent, strides, mask_head, mask_query,
                   mask_token, mma, HEADS, ROWS, QUERIES, DIM, WIDE, MASK, CAPPED, CAUSAL, R, N_DENSE, S)
