"""Attention of few queries over dense tokens, eight a warp at a time: a lane has some numbers of all of them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import lookups, octet_ptx
from tersor.ops.kv_attention.kernels.arriving import load, registers
from tersor.ops.kv_attention.kernels.attending import capped
from tersor.ops.kv_attention.kernels.joining import PAD, joined, shares, written
from tersor.ops.kv_attention.kernels.meeting import LARGEST, LOG2E, NONE, across
from tersor.ops.kv_attention.kernels.turning import keep, turned

TOKENS = gl.constexpr(8)  # of a warp at a time
SCATTERED, FROM = gl.constexpr(octet_ptx.scattered()), gl.constexpr(lookups.FROM)


@gluon.jit
def from_lane(number, lane, source: gl.constexpr):
    """Return a number of another lane."""
    return gl.inline_asm_elementwise(FROM, registers(1, 2), [number, lane * 0 + source], dtype=gl.float32, is_pure=False,
                                     pack=1)


@gluon.jit
def halves(words, KIND: gl.constexpr):
    """Return the numbers of words, two each."""
    found = ()
    for place in gl.static_range(len(words)):
        if gl.bfloat16 == KIND:
            found = found + ((words[place] << 16).to(gl.float32, bitcast=True),
                             (words[place] & -65536).to(gl.float32, bitcast=True))
        else:
            found = found + ((words[place] & 65535).to(gl.int16).to(KIND, bitcast=True).to(gl.float32),
                             (words[place] >> 16).to(gl.int16).to(KIND, bitcast=True).to(gl.float32))
    return found


@gluon.jit
def load_tokens(sinks_at, tail_at, index, sinks, count, lane, steps, KIND: gl.constexpr, DIM: gl.constexpr):
    """Return a lane's numbers of eight dense tokens from `index` on; the last one's for those beyond."""
    WORDS: gl.constexpr = DIM // 64
    found = ()
    for place in gl.static_range(TOKENS):
        own = gl.minimum(index + place, count - 1)
        at = gl.where(own < sinks, sinks_at + own * steps[0], tail_at + (own - sinks) * steps[1]) + lane * WORDS
        found = found + (load(at, WORDS) if WORDS >= 2 else (gl.load(at),),)
    return found


@gluon.jit
def load_asked(query, row, lane, scaling, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Return a lane's numbers of four queries from `row` on, times `scaling`."""
    EACH: gl.constexpr = DIM // 32
    found = ()
    for which in gl.static_range(4):
        inside = row + which + lane * 0 < ROWS
        numbers = ()
        for place in gl.static_range(EACH):
            at = query + ((row + which) * DIM + lane * EACH + place)
            numbers = numbers + (gl.load(at, inside, other=0.0).to(gl.float32) * scaling,)
        found = found + (numbers,)
    return found


@gluon.jit
def scored(asked, keys, lane, KIND: gl.constexpr, DIM: gl.constexpr):
    """Return a lane's score: of token lane / 4 and query lane % 4."""
    EACH: gl.constexpr = DIM // 32
    every = ()
    for token in gl.static_range(TOKENS):
        numbers = halves(keys[token], KIND)
        for which in gl.static_range(4):
            part = asked[which][0] * numbers[0]
            for place in gl.static_range(1, EACH):
                part += asked[which][place] * numbers[place]
            every = every + (part,)
    return gl.inline_asm_elementwise(SCATTERED, registers(1, 33), every + (lane,), dtype=gl.float32, is_pure=False,
                                     pack=1)


@gluon.jit
def masked(score, mask, place, inside, row, head, middle, count, mask_head, mask_query, mask_token, ROWS: gl.constexpr,
           QUERIES: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr):
    """Return a lane's score under the mask, -inf where there is no token."""
    inside = inside & (row < ROWS)
    if CAUSAL:
        inside = inside & (place <= count + middle - QUERIES + row % QUERIES)
    if MASK != "none":
        at = mask + ((head * (ROWS // QUERIES) + row // QUERIES) * mask_head + row % QUERIES * mask_query
                     + place * mask_token)
        if MASK == "bool":
            inside = inside & (gl.load(at, inside, other=0) != 0)
        else:
            score += gl.load(at, inside, other=0.0).to(gl.float32) * LOG2E
    return gl.where(inside, score, NONE)


@gluon.jit
def mixed(acc, weight, shrink, values, lane, KIND: gl.constexpr, DIM: gl.constexpr):
    """Return sums of four queries, each a lane's numbers, with eight tokens more."""
    EACH: gl.constexpr = DIM // 32
    more = ()
    for which in gl.static_range(4):
        less = from_lane(shrink, lane, which)
        numbers = ()
        for place in gl.static_range(EACH):
            numbers = numbers + (acc[which][place] * less,)
        more = more + (numbers,)
    acc = more
    for token in gl.static_range(TOKENS):
        value = halves(values[token], KIND)
        more = ()
        for which in gl.static_range(4):
            own = from_lane(weight, lane, 4 * token + which)
            numbers = ()
            for place in gl.static_range(EACH):
                numbers = numbers + (acc[which][place] + own * value[place],)
            more = more + (numbers,)
        acc = more
    return acc


@gluon.jit
def over_nearby(split, others, at, head, row, query, dense, counts, steps, signs, start, mask, softcap, scaling, peaks,
                totals, sums, mask_head, mask_query, mask_token, warp, lane, ROWS: gl.constexpr, QUERIES: gl.constexpr,
                DIM: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr, CAUSAL: gl.constexpr,
                TURNED: gl.constexpr, S: gl.constexpr):
    """Attend with four queries from `row` on to the dense tokens that are this program's, one of `others`; write a part.

    `dense` are sinks and recent tokens as words, keys, then values; `steps` of a token of each; `counts` are closed
    tokens, sinks and recent ones. Sums are written as coordinates, where values are TURNED to such.
    """
    EACH: gl.constexpr = DIM // 32
    KIND: gl.constexpr = query.dtype.element_ty
    quad = lane & 3
    middle, sinks, recent = counts
    count = sinks + recent
    asked = load_asked(query, row, lane, scaling, ROWS, DIM)
    peak = gl.zeros_like(lane).to(gl.float32) + NONE
    total = gl.zeros_like(peak)
    acc = ()
    for _ in gl.static_range(4):
        numbers = ()
        for _ in gl.static_range(EACH):
            numbers = numbers + (gl.zeros_like(peak),)
        acc = acc + (numbers,)
    for turn in range(0, (count + others * S * TOKENS - 1) // (others * S * TOKENS)):
        index = (turn * others + split) * (S * TOKENS) + warp * TOKENS
        keys = load_tokens(dense[0], dense[1], index, sinks, count, lane, (steps[0], steps[1]), KIND, DIM)
        values = load_tokens(dense[2], dense[3], index, sinks, count, lane, (steps[2], steps[3]), KIND, DIM)
        score = capped(scored(asked, keys, lane, KIND, DIM), softcap, CAPPED)
        own = index + (lane >> 2)
        inside = own < count
        place = gl.where(inside, gl.where(own < sinks, own, own + middle), 0)
        score = masked(score, mask, place, inside, row + quad, head, middle, count, mask_head, mask_query, mask_token,
                       ROWS, QUERIES, MASK, CAUSAL)
        fresh = gl.maximum(peak, across(score, LARGEST))
        base = gl.where(fresh == NONE, 0.0, fresh)
        shrink = gl.exp2(peak - base)
        weight = gl.exp2(score - base)
        total = total * shrink + weight
        peak = fresh
        acc = mixed(acc, weight, shrink, values, lane, KIND, DIM)
    share = shares(peak, total, start, warp, quad, S)
    for which in gl.static_range(4):
        own = from_lane(share, lane, which)
        numbers = ()
        for place in gl.static_range(EACH):
            numbers = numbers + ((acc[which][place] * own).to(gl.int32, bitcast=True),)
        keep(start + (32 * S + ((warp * 4 + which) * (DIM + PAD) + lane * EACH) * 4), numbers)
    found, most, whole = joined(start, warp, lane, DIM, S)
    if TURNED:
        numbers = ()
        for place in gl.static_range(EACH):
            numbers = numbers + (found[place] * gl.load(signs + (lane * EACH + place)),)
        found = turned(numbers, lane)
    written(found, most, whole, row + warp, at, peaks, totals, sums, lane, ROWS, DIM)
