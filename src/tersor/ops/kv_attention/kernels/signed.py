"""Attention of few queries over closed tokens whose codes are signs; dense tokens as in `attending.py`.

A warp takes turns of 128 tokens by itself. bits.py says which lane has what. Keys are rows of bits; values lie turned, 32
tokens a word, so that both meet integers on the binary tensor cores as they lie in memory, and nothing is decoded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels import bits
from tersor.ops.kv_attention.kernels.attending import capped, over_dense, waited
from tersor.ops.kv_attention.kernels.ring import shift_of

NONE = gl.constexpr(float("-inf"))
LOG2E = gl.constexpr(1.4426950408889634)
TILES = gl.constexpr(bits.ASKED_TILES)
GIVEN_TILES = gl.constexpr(bits.GIVEN_TILES)
TURN = gl.constexpr(bits.TOKENS)
MOST = gl.constexpr(float(bits.MOST))
LEAST = gl.constexpr(1e-30)  # the largest weight of a turn, where it is divided by
ROUNDS = gl.constexpr(float(1 << 23))  # added to a number below it, leaves its nearest integer in the lowest bits
EACH = gl.constexpr(16)  # tokens of a lane


MIXED, TURNED, GATHERED = (gl.constexpr(text) for text in (bits.mixed(), bits.turned(), bits.gathered(8)))
MET = gl.constexpr(tuple(bits.met(steps) for steps in range(1, 5)))
LOAD = gl.constexpr((None, None, bits.load(2), None, bits.load(4)))
SUM, LARGEST = (gl.constexpr(bits.across(kind)) for kind in ("add.s32", "max.NaN.f32"))
registers = gluon.constexpr_function(bits.registers)


@gluon.constexpr_function
def integers(count: int) -> tuple:
    """Return the dtypes of so many words."""
    return (gl.int32,) * count


@gluon.jit
def load(at, COUNT: gl.constexpr):
    """Return COUNT words of each lane as a tuple, two or four."""
    return gl.inline_asm_elementwise(LOAD[COUNT], registers(COUNT, 0, "l"), [at], dtype=integers(COUNT), is_pure=True,
                                     pack=1)


@gluon.jit
def place_of(pages, token, batch, sequence, BLOCK: gl.constexpr, PAGE: gl.constexpr):
    """Return how far the slot of a turn's tokens is from the first page, in words."""
    return gl.load(pages + ((token >> shift_of(BLOCK * PAGE)) * batch + sequence)) * 4


@gluon.jit
def line_of(token, head, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr):
    """Return which of a slot's blocks, head by head, has a token."""
    return ((token >> shift_of(BLOCK)) & (PAGE - 1)) * HEADS + head


@gluon.jit
def load_keys(words, far, line, token, quad, WORDS: gl.constexpr, BLOCK: gl.constexpr):
    """Return the words of a lane's tokens: of two tokens in turn, pair by pair.

    They lie pair by pair of a run of 16 tokens, then by run, word and token of a pair: see `shapes.woven`.
    """
    STEPS: gl.constexpr = (WORDS + 3) // 4
    RUNS: gl.constexpr = BLOCK // EACH
    EVEN: gl.constexpr = WORDS % 4 == 0
    found = ()
    run = (token & (BLOCK - 1)) >> 4
    first = words + (far + line * (BLOCK * WORDS) + run * (2 * WORDS))
    for pair in gl.static_range(EACH // 2):
        if EVEN and STEPS % 2 == 0:
            for step in gl.static_range(STEPS // 2):
                found = found + load(first + (pair * (RUNS * 2 * WORDS) + (quad * STEPS + 2 * step) * 2), 4)
        else:
            for step in gl.static_range(STEPS):
                word = gl.minimum(quad * STEPS + step, WORDS - 1)  # those beyond the last meet zeros
                found = found + load(first + (pair * (RUNS * 2 * WORDS) + word * 2), 2)
    return found


@gluon.jit
def load_scales(words, room, far, row, inside, steps, BYTES: gl.constexpr):
    """Return the scales of a lane's tokens, zeros of none; `steps` are what scales of one byte stand for."""
    found = ()
    some = gl.where(inside, -1, 0)
    if BYTES == 1:
        four = load(words + (far + room + row // 4), 4)
        for each in gl.static_range(EACH):
            step = gl.load(steps + ((four[each // 4] >> (8 * (each % 4))) & 255))
            found = found + ((step.to(gl.int32, bitcast=True) & some).to(gl.float32, bitcast=True),)
    else:
        high = gl.where(inside, -65536, 0)
        first = words + (far + room + row // 2)
        eight = load(first, 4) + load(first + 4, 4)
        for word in gl.static_range(EACH // 2):
            found = found + (((eight[word] << 16) & some).to(gl.float32, bitcast=True),
                             (eight[word] & high).to(gl.float32, bitcast=True))
    return found


@gluon.jit
def across(number, KIND: gl.constexpr):
    """Return the sum or the largest of a number over the lanes of one query."""
    return gl.inline_asm_elementwise(KIND, registers(1, 1), [number], dtype=number.dtype, is_pure=False,
                                     pack=1)


@gluon.jit
def scored(keys, planes, begin, unit, shift, bias, scales, softcap, WORDS: gl.constexpr, CAPPED: gl.constexpr):
    """Return the scores of a lane's tokens; `bias` is -inf where there are none."""
    STEPS: gl.constexpr = (WORDS + 3) // 4
    found = ()
    for pair in gl.static_range(EACH // 2):
        sums = gl.inline_asm_elementwise(MET[STEPS - 1], registers(2, 2 * STEPS + TILES * STEPS + 1),
                                         keys[2 * pair * STEPS : 2 * (pair + 1) * STEPS] + planes + (begin,),
                                         dtype=integers(2), is_pure=True, pack=1)
        for which in gl.static_range(2):
            score = sums[which].to(gl.float32) * (unit * scales[2 * pair + which])
            if CAPPED:
                found = found + (capped(score + shift, softcap, CAPPED) + bias,)
            else:
                found = found + (score + (shift + bias),)
    return found


@gluon.jit
def masked(scores, mask, token, inside, row, head, mask_head, mask_query, mask_token, ROWS: gl.constexpr,
           QUERIES: gl.constexpr, MASK: gl.constexpr):
    """Return scores under the mask of tokens `token` …."""
    if MASK == "none":
        return scores
    else:
        found = ()
        first = mask + (head * (ROWS // QUERIES) + row // QUERIES) * mask_head + row % QUERIES * mask_query
        for each in gl.static_range(EACH):
            at = first + (token + each) * mask_token
            if MASK == "bool":
                found = found + (gl.where(gl.load(at, inside & (row < ROWS), other=0) != 0, scores[each], NONE),)
            else:
                found = found + (scores[each] + gl.load(at, inside & (row < ROWS), other=0.0).to(gl.float32) * LOG2E,)
        return found


@gluon.jit
def weighed(scores, scales, peak, total):
    """Return weights times values' scales as integers, their unit, what sums shrink by, the new peak and sum of weights."""
    most = scores[0]
    for each in gl.static_range(1, EACH):
        most = gl.maximum(most, scores[each])
    fresh = gl.maximum(peak, across(most, LARGEST))
    base = gl.where(fresh == NONE, 0.0, fresh)
    shrink = gl.exp2(peak - base)
    total = total * shrink
    weights = ()
    largest = gl.zeros_like(total)
    for each in gl.static_range(EACH):
        weight = gl.exp2(scores[each] - base)
        total = total + weight
        weight = weight * scales[each]
        largest = gl.inline_asm_elementwise("max.NaN.f32 $0, $1, $2;", registers(1, 2), [largest, weight],
                                            dtype=gl.float32, is_pure=True, pack=1)
        weights = weights + (weight,)
    largest = across(largest, LARGEST)
    inverse = MOST / gl.maximum(largest, LEAST)
    found = ()
    for pair in gl.static_range(EACH // 2):
        low = (weights[2 * pair] * inverse + ROUNDS).to(gl.int32, bitcast=True)
        high = (weights[2 * pair + 1] * inverse + ROUNDS).to(gl.int32, bitcast=True)
        found = found + (gl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", registers(1, 2), [low, high],
                                                   dtype=gl.int32, is_pure=True, pack=1),)
    return found, largest / MOST, shrink, fresh, total


@gluon.jit
def planes_of(words, lane):
    """Return the planes of a column's weights, a word for each tile, and the sum of the weights of a lane's query."""
    COUNT: gl.constexpr = EACH // 2
    total = words[0]  # halves stay apart: sixteen of GIVEN bits are less than 16 bits
    for pair in gl.static_range(1, COUNT):
        total = total + words[pair]
    near = (lane & 3) * 8 + (lane >> 3 & 3)
    every = gl.inline_asm_elementwise(GATHERED, registers(2 * COUNT, COUNT + 2), words + (near, near + 4),
                                      dtype=integers(2 * COUNT), is_pure=False, pack=1)
    found = gl.inline_asm_elementwise(TURNED, registers(GIVEN_TILES, 2 * COUNT + 1), every + (lane >> 2 & 1,),
                                      dtype=integers(GIVEN_TILES), is_pure=True, pack=1)
    return found, across((total & 65535) + ((total >> 16) & 65535), SUM)


@gluon.jit
def added(acc, values, planes, total, unit, shrink, LINES: gl.constexpr):
    """Return sums of signs plus those of a turn."""
    found = ()
    for part in gl.static_range(LINES // 32):
        sums = gl.inline_asm_elementwise(MIXED, registers(4, 5 + GIVEN_TILES),
                                         values[4 * part : 4 * part + 4] + planes + (-total,), dtype=integers(4),
                                         is_pure=True, pack=1)
        for which in gl.static_range(4):
            found = found + (acc[4 * part + which] * shrink + sums[which].to(gl.float32) * unit,)
    return found


@gluon.jit
def zeros(COUNT: gl.constexpr, S: gl.constexpr):
    """Return zeros of each lane."""
    found = ()
    for _ in gl.static_range(COUNT):
        found = found + (gl.zeros([32 * S], gl.float32, gl.BlockedLayout([1], [32], [S], [0])),)
    return found


@gluon.constexpr_function
def doubled(count: int) -> int:
    """Return the power of two that holds so many."""
    return 1 << (count - 1).bit_length()


@gluon.jit
def halved(parts):
    """Return tensors joined along a new last axis, each with the one half of them behind it."""
    HALF: gl.constexpr = len(parts) // 2
    found = ()
    for place in gl.static_range(HALF):
        found = found + (gl.join(parts[place], parts[place + HALF]),)
    return found


@gluon.jit
def finish(acc, peak, total, first, at, peaks, totals, sums, ROWS: gl.constexpr, WIDE: gl.constexpr,
           LINES: gl.constexpr, S: gl.constexpr):
    """Join the warps' sums of four queries, from `first` on, and write them."""
    COUNT: gl.constexpr = LINES // 8
    ROOM: gl.constexpr = doubled(COUNT)
    by_warp = peak.reshape([S, 32])
    most = gl.max(by_warp, 0)
    base = gl.where(most == NONE, 0.0, most)
    share = gl.exp2(by_warp - gl.convert_layout(base, gl.SliceLayout(0, by_warp.type.layout))[None, :])
    whole = gl.sum(gl.sum(total.reshape([S, 32]) * share, 0).reshape([8, 4]), 0)
    row = first + gl.arange(0, 4, layout=whole.type.layout)
    gl.store(totals + at * ROWS + row, whole, row < ROWS)
    top = gl.max(most.reshape([8, 4]), 0)
    row = first + gl.arange(0, 4, layout=top.type.layout)
    gl.store(peaks + at * ROWS + row, top, row < ROWS)
    near = gl.convert_layout(share.reshape([32 * S]), gl.BlockedLayout([1], [32], [S], [0]))
    parts = ()
    for place in gl.static_range(COUNT):
        parts = parts + (acc[place] * near,)
    for _ in gl.static_range(ROOM - COUNT):
        parts = parts + (gl.zeros_like(near),)
    for _ in gl.static_range(ROOM.bit_length() - 1):
        parts = halved(parts)
    joined = gl.sum(parts[0].reshape([S, 32, ROOM]), 0)
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [S, 1], [1, 0])
    joined = gl.convert_layout(joined, flat)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(1, flat))[:, None]
    place = gl.arange(0, ROOM, layout=gl.SliceLayout(0, flat))[None, :]
    row = first + (lane & 3)
    column = place // 4 * 32 + (lane >> 2) * 4 + place % 4
    gl.store(sums + (at * ROWS + row) * WIDE + column, joined, (row < ROWS) & (column < LINES) & (place < COUNT))


@gluon.jit
def over_signs(split, splits, at, head, sequence, near, begins, units, shifts, sources, key_steps, value_steps, mask,
               softcap, peaks, totals, sums, middle, batch, early, mask_head, mask_query, mask_token,
               HEADS: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
               KEYS: gl.constexpr, VALUES: gl.constexpr, KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr,
               WIDE: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr, SETS: gl.constexpr, S: gl.constexpr):
    """Attend to the turns of closed tokens that are this program's; KEYS and VALUES are signs of a token."""
    key_words, value_words, key_pages, value_pages, key_room, value_room = sources
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [S], [0])
    STEPS: gl.constexpr = (KEYS // 32 + 3) // 4
    COUNT: gl.constexpr = VALUES // 8
    thread = gl.arange(0, 32 * S, layout=flat)
    lane = thread & 31
    quad = lane & 3
    turns = (middle + TURN - 1) // TURN
    start = (split * S + (thread >> 5)) * TURN
    near_start = gl.where(start < middle, start, 0)  # turns that are none read the first one's
    token = near_start + (lane >> 2) * EACH
    line = line_of(token, head, HEADS, BLOCK, PAGE)
    far = place_of(key_pages, near_start, batch, sequence, BLOCK, PAGE)
    keys = load_keys(key_words, far, line, token, quad, KEYS // 32, BLOCK)
    inside = start + (lane >> 2) * EACH < middle
    key_scales = load_scales(key_words, key_room, far, line * BLOCK + (token & (BLOCK - 1)), inside, key_steps, KEY_BYTES)
    far_values = place_of(value_pages, near_start, batch, sequence, BLOCK, PAGE)
    ready = waited()
    part = sequence * HEADS + head + ready
    planes = ()
    for place in gl.static_range(SETS * TILES * STEPS):
        planes = planes + (gl.load(near + ((part * SETS * TILES * STEPS + place) * 32 + lane)),)
    begin, unit, shift, peak, total = (), (), (), (), ()
    for group in gl.static_range(SETS):
        at_row = part * (4 * SETS) + 4 * group + quad
        opening = gl.zeros([32 * S], gl.int32, flat)
        for word in gl.static_range(4 * STEPS):
            opening = opening + gl.load(begins + ((part * (4 * STEPS) + word) * (4 * SETS) + 4 * group + quad))
        begin = begin + (opening,)
        unit = unit + (gl.load(units + at_row),)
        shift = shift + (gl.load(shifts + at_row),)
        peak = peak + (gl.full([32 * S], NONE, gl.float32, flat),)
        total = total + (gl.zeros([32 * S], gl.float32, flat),)
    acc = zeros(SETS * COUNT, S)
    for _ in range(0, (turns + splits * S - 1) // (splits * S)):
        mine = near_start + quad * 32
        half = line_of(mine, head, HEADS, BLOCK, PAGE) * (BLOCK // 32) + ((mine & (BLOCK - 1)) >> 5)
        first = value_words + (far_values + half * VALUES + (lane >> 2) * 4)
        values = ()
        for each in gl.static_range(VALUES // 32):
            values = values + load(first + each * 32, 4)
        value_scales = load_scales(value_words, value_room, far_values, line * BLOCK + (token & (BLOCK - 1)), inside,
                                   value_steps, VALUE_BYTES)
        after = start + splits * (S * TURN)
        near_start = gl.where(after < middle, after, 0)
        far = place_of(key_pages, near_start, batch, sequence, BLOCK, PAGE)
        far_values = place_of(value_pages, near_start, batch, sequence, BLOCK, PAGE)
        every = ()
        bias = gl.where(inside, 0.0, NONE)
        for group in gl.static_range(SETS):
            scores = scored(keys, planes[group * TILES * STEPS : (group + 1) * TILES * STEPS], begin[group], unit[group],
                            shift[group], bias, key_scales, softcap, KEYS // 32, CAPPED)
            every = every + masked(scores, mask, early + token, inside, 4 * group + quad, head, mask_head, mask_query,
                                   mask_token, ROWS, QUERIES, MASK)
        start = after
        token = near_start + (lane >> 2) * EACH
        line = line_of(token, head, HEADS, BLOCK, PAGE)
        keys = load_keys(key_words, far, line, token, quad, KEYS // 32, BLOCK)
        inside = start + (lane >> 2) * EACH < middle
        key_scales = load_scales(key_words, key_room, far, line * BLOCK + (token & (BLOCK - 1)), inside, key_steps,
                                 KEY_BYTES)
        fresh, sum_of, done = (), (), ()
        for group in gl.static_range(SETS):
            numbers, size, shrink, most, whole = weighed(every[EACH * group : EACH * (group + 1)], value_scales,
                                                         peak[group], total[group])
            fresh = fresh + (most,)
            sum_of = sum_of + (whole,)
            columns, weights = planes_of(numbers, lane)
            done = done + added(acc[group * COUNT : (group + 1) * COUNT], values, columns, weights, size, shrink, VALUES)
        peak, total, acc = fresh, sum_of, done
    for group in gl.static_range(SETS):
        finish(acc[group * COUNT : (group + 1) * COUNT], peak[group], total[group], 4 * group, at, peaks, totals, sums,
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
                 SETS: gl.constexpr, R: gl.constexpr, N_DENSE: gl.constexpr, S: gl.constexpr):
    """As `attend`, over signs: KEYS and VALUES of a token, with scales of so many bytes."""
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
        over_signs(split, splits, at, head, sequence, near, begins, units, shifts, sources, key_steps, value_steps, mask,
                   softcap, peaks, totals, sums, middle, batch, sinks, mask_head, mask_query, mask_token, HEADS, ROWS,
                   QUERIES, BLOCK, PAGE, KEYS, VALUES, KEY_BYTES, VALUE_BYTES, WIDE, MASK, CAPPED, SETS, S)
    else:
        strides = (sink_batch, sink_head, sink_token, tail_batch, tail_head, tail_token, sink_batch_v, sink_head_v,
                   sink_token_v, tail_batch_v, tail_head_v, tail_token_v)
        over_dense(split - splits, at, head, sequence, query, sink_keys, sink_values, tail_keys, tail_values, mask,
                   softcap, scaling, peaks, totals, sums, middle, sinks, recent, strides, mask_head, mask_query,
                   mask_token, mma, HEADS, ROWS, QUERIES, DIM, WIDE, MASK, CAPPED, CAUSAL, R, N_DENSE, S)
