"""Signs of a turn and integers in bit planes: scores, weights, and sums of signs. bits.py says which lane has what."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import bits
from tersor.ops.kv_attention.kernels.arriving import integers, registers
from tersor.ops.kv_attention.kernels.attending import capped

NONE = gl.constexpr(float("-inf"))
LOG2E = gl.constexpr(1.4426950408889634)
GIVEN_TILES = gl.constexpr(bits.GIVEN_TILES)
MOST = gl.constexpr(float(bits.MOST))
LEAST = gl.constexpr(1e-30)  # the largest weight of a turn, where it is divided by
ROUNDS = gl.constexpr(float(1 << 23))  # added to a number below it, leaves its nearest integer in the lowest bits
EACH = gl.constexpr(bits.EACH)
MIXED, TURNED, GATHERED = (gl.constexpr(text) for text in (bits.mixed(), bits.turned(), bits.gathered(bits.EACH // 2)))
MOST_STEPS = gl.constexpr(4)
MET = gl.constexpr(tuple(bits.met(steps, planes) for planes in range(2, bits.ASKED + 2, 2) for steps in range(1, 5)))
SUM, LARGEST = (gl.constexpr(bits.across(kind)) for kind in ("add.s32", "max.NaN.f32"))


@gluon.constexpr_function
def doubled(count: int) -> int:
    """Return the power of two that holds so many."""
    return 1 << (count - 1).bit_length()


@gluon.jit
def across(number, KIND: gl.constexpr):
    """Return the sum or the largest of a number over the lanes of one query."""
    return gl.inline_asm_elementwise(KIND, registers(1, 1), [number], dtype=number.dtype, is_pure=False,
                                     pack=1)


@gluon.jit
def scored(keys, planes, begin, unit, shift, bias, scales, softcap, WORDS: gl.constexpr, CAPPED: gl.constexpr):
    """Return the scores of a lane's tokens; `bias` is -inf where there are none."""
    STEPS: gl.constexpr = (WORDS + 3) // 4
    TILES: gl.constexpr = len(planes) // STEPS
    found = ()
    for pair in gl.static_range(EACH // 2):
        sums = gl.inline_asm_elementwise(MET[(TILES - 1) * MOST_STEPS + STEPS - 1], registers(2, 2 * STEPS + TILES * STEPS + 1),
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
def added(acc, values, columns, totals, units, shrinks, LINES: gl.constexpr):
    """Return sums of signs plus those of a turn, of each four queries one by one."""
    SETS: gl.constexpr = len(totals)
    COUNT: gl.constexpr = LINES // 8
    every = ()
    for part in gl.static_range(LINES // 32):
        for turn in gl.static_range(SETS):
            sums = gl.inline_asm_elementwise(
                MIXED, registers(4, 5 + GIVEN_TILES), values[4 * part : 4 * part + 4]
                + columns[turn * GIVEN_TILES : (turn + 1) * GIVEN_TILES] + (-totals[turn],), dtype=integers(4),
                is_pure=True, pack=1)
            for which in gl.static_range(4):
                every = every + (acc[turn * COUNT + 4 * part + which] * shrinks[turn]
                                 + sums[which].to(gl.float32) * units[turn],)
    found = ()
    for turn in gl.static_range(SETS):
        for part in gl.static_range(LINES // 32):
            found = found + every[(part * SETS + turn) * 4 : (part * SETS + turn + 1) * 4]
    return found


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
