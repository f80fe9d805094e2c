"""Codes of a turn and integers of 16 bits: loads, scores, weights and sums. ../octets.py says which lane has what."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import octet_ptx
from tersor.ops.kv_attention.kernels.arriving import integers, line_of, load, registers
from tersor.ops.kv_attention.kernels.attending import capped
from tersor.ops.kv_attention.kernels.meeting import LARGEST, LEAST, LOG2E, NONE, ROUNDS, across

RUN = gl.constexpr(8)
GROUP = gl.constexpr(16)
UNIT = gl.constexpr(64)  # tokens
MOST = gl.constexpr(65535.0)  # a weight's largest integer
TURNED, HALVES = gl.constexpr(octet_ptx.TURNED), gl.constexpr(octet_ptx.HALVES)
# by bits, a lane's words or units, and sets
MET = gl.constexpr(tuple(octet_ptx.met(held, words, sets)
                         for held in (2, 4) for words in (1, 2, 4, 8)
                         for sets in (1, 2)))
MIXED = gl.constexpr(tuple(octet_ptx.mixed(held, units, sets) for held in (2, 4) for units in (1, 2) for sets in (1, 2)))
COLUMNS = gl.constexpr(2)  # registers of a step's weights, or queries


@gluon.constexpr_function
def lane_words(bits_: int, dim: int) -> int:
    """Return a lane's words of a key."""
    return dim * bits_ // 128


@gluon.constexpr_function
def log_of(count: int) -> int:
    """Return the logarithm of a power of two."""
    return count.bit_length() - 1


@gluon.jit
def load_keys(words, far, token, head, quad, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
              DIM: gl.constexpr, BITS: gl.constexpr):
    """Return the words of a lane's eight tokens from `token` on: of two tokens in turn, pair by pair."""
    EACH: gl.constexpr = min(2, lane_words(BITS, DIM))
    SOME: gl.constexpr = lane_words(BITS, DIM) // EACH
    first = words + (far + line_of(token, head, HEADS, BLOCK, PAGE) * (BLOCK * DIM * BITS // 32)
                     + (((token & (BLOCK - 1)) // RUN) * 4 + quad) * (2 * EACH))
    found = ()
    for place in gl.static_range(RUN // 2 * SOME):
        found = found + load(first + place * (BLOCK * EACH), 2 * EACH)
    return found


@gluon.jit
def load_values(words, far, token, head, group, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
                DIM: gl.constexpr, BITS: gl.constexpr):
    """Return the words of a lane's sixteen tokens from `token` on: four numbers of each 32, word by word."""
    SOME: gl.constexpr = BITS // 2
    first = words + (far + line_of(token, head, HEADS, BLOCK, PAGE) * (BLOCK * DIM * BITS // 32)
                     + ((token & (BLOCK - 1)) // GROUP) * (SOME * DIM) + group * 4)
    found = ()
    for part in gl.static_range(DIM // 32):
        for word in gl.static_range(SOME):
            found = found + load(first + (word * DIM + part * 32), 4)
    return found


@gluon.jit
def load_scales(words, room, far, token, head, inside, steps, HEADS: gl.constexpr, BLOCK: gl.constexpr,
                PAGE: gl.constexpr, BYTES: gl.constexpr):
    """Return the scales of a lane's eight tokens, zeros of none; `steps` are what scales of one byte stand for."""
    row = line_of(token, head, HEADS, BLOCK, PAGE) * BLOCK + (token & (BLOCK - 1))
    found = ()
    some = gl.where(inside, -1, 0)
    if BYTES == 1:
        two = load(words + (far + room + row // 4), 2)
        for each in gl.static_range(RUN):
            step = gl.load(steps + ((two[each // 4] >> (8 * (each % 4))) & 255))
            found = found + ((step.to(gl.int32, bitcast=True) & some).to(gl.float32, bitcast=True),)
    else:
        high = gl.where(inside, -65536, 0)
        four = load(words + (far + room + row // 2), 4)
        for word in gl.static_range(RUN // 2):
            found = found + (((four[word] << 16) & some).to(gl.float32, bitcast=True),
                             (four[word] & high).to(gl.float32, bitcast=True))
    return found


@gluon.jit
def scored(keys, table, queries, begin, unit, shift, bias, scales, softcap, DIM: gl.constexpr, BITS: gl.constexpr,
           SETS: gl.constexpr, CAPPED: gl.constexpr):
    """Return the scores of a lane's eight tokens, set by set; `bias` is -inf where there are none."""
    WORDS: gl.constexpr = lane_words(BITS, DIM)
    found = ()
    for pair in gl.static_range(RUN // 2):
        sums = gl.inline_asm_elementwise(
            MET[BITS // 4 * 8 + log_of(WORDS) * 2 + SETS - 1], registers(2 * SETS, 2 * WORDS + len(table) + SETS * (DIM // 32) * COLUMNS + SETS),
            keys[2 * pair * WORDS : 2 * (pair + 1) * WORDS] + table + queries + begin, dtype=integers(2 * SETS),
            is_pure=True, pack=1)
        for turn in gl.static_range(SETS):
            for which in gl.static_range(2):
                score = sums[2 * turn + which].to(gl.float32) * (unit[turn] * scales[2 * pair + which])
                if CAPPED:
                    found = found + (capped(score + shift[turn], softcap, CAPPED) + bias,)
                else:
                    found = found + (score + (shift[turn] + bias),)
    return found


@gluon.jit
def of_set(scores, turn: gl.constexpr, SETS: gl.constexpr):
    """Return the scores of one set, token by token."""
    found = ()
    for pair in gl.static_range(len(scores) // (2 * SETS)):
        found = found + scores[2 * (pair * SETS + turn) : 2 * (pair * SETS + turn) + 2]
    return found


@gluon.jit
def masked(scores, mask, token, inside, row, head, mask_head, mask_query, mask_token, ROWS: gl.constexpr,
           QUERIES: gl.constexpr, MASK: gl.constexpr):
    """Return scores under the mask: of eight tokens from each of `token` on, `inside` or not."""
    if MASK == "none":
        return scores
    else:
        found = ()
        first = mask + (head * (ROWS // QUERIES) + row // QUERIES) * mask_head + row % QUERIES * mask_query
        for each in gl.static_range(len(scores)):
            at = first + (token[each // RUN] + each % RUN) * mask_token
            there = inside[each // RUN] & (row < ROWS)
            if MASK == "bool":
                found = found + (gl.where(gl.load(at, there, other=0) != 0, scores[each], NONE),)
            else:
                found = found + (scores[each] + gl.load(at, there, other=0.0).to(gl.float32) * LOG2E,)
        return found


@gluon.jit
def weighed(scores, scales, peak, total, extra):
    """Return columns of weights times values' scales, their unit, what sums shrink by, and the new peak and sums.

    Sums are of weights, and of weights times scales.
    """
    COUNT: gl.constexpr = len(scores)
    most = scores[0]
    for each in gl.static_range(1, COUNT):
        most = gl.maximum(most, scores[each])
    fresh = gl.maximum(peak, across(most, LARGEST))
    base = gl.where(fresh == NONE, 0.0, fresh)
    shrink = gl.exp2(peak - base)
    total = total * shrink
    extra = extra * shrink
    weights = ()
    largest = gl.zeros_like(total)
    for each in gl.static_range(COUNT):
        weight = gl.exp2(scores[each] - base)
        total = total + weight
        weight = weight * scales[each]
        extra = extra + weight
        largest = gl.inline_asm_elementwise("max.NaN.f32 $0, $1, $2;", registers(1, 2), [largest, weight],
                                            dtype=gl.float32, is_pure=True, pack=1)
        weights = weights + (weight,)
    largest = across(largest, LARGEST)
    inverse = MOST / gl.maximum(largest, LEAST)
    found = ()
    for pair in gl.static_range(COUNT // 2):
        low = (weights[2 * pair] * inverse + ROUNDS).to(gl.int32, bitcast=True)
        high = (weights[2 * pair + 1] * inverse + ROUNDS).to(gl.int32, bitcast=True)
        both = gl.inline_asm_elementwise(HALVES, registers(1, 2), [low, high], dtype=gl.int32, is_pure=True, pack=1)
        found = found + (gl.inline_asm_elementwise(TURNED, registers(1, 1), [both], dtype=gl.int32, is_pure=False,
                                                   pack=1),)
    return found, largest / MOST, shrink, fresh, total, extra


@gluon.jit
def added(acc, values, table, columns, units, shrinks, DIM: gl.constexpr, BITS: gl.constexpr):
    """Return sums of integers plus those of a turn, of each four queries one by one; `values` are of each unit."""
    SETS: gl.constexpr = len(units)
    UNITS: gl.constexpr = len(values)
    WORDS: gl.constexpr = 2 * BITS
    every = ()
    for part in gl.static_range(DIM // 32):
        words = ()
        for unit in gl.static_range(UNITS):
            words = words + values[unit][part * WORDS : (part + 1) * WORDS]
        sums = gl.inline_asm_elementwise(
            MIXED[BITS // 4 * 4 + UNITS * 2 + SETS - 3], registers(4 * SETS, UNITS * WORDS + len(table) + SETS * UNITS * 4),
            words + table + columns, dtype=integers(4 * SETS), is_pure=True, pack=1)
        for turn in gl.static_range(SETS):
            for which in gl.static_range(4):
                every = every + (acc[turn * (DIM // 8) + 4 * part + which] * shrinks[turn]
                                 + sums[4 * turn + which].to(gl.float32) * units[turn],)
    found = ()
    for turn in gl.static_range(SETS):
        for part in gl.static_range(DIM // 32):
            found = found + every[(part * SETS + turn) * 4 : (part * SETS + turn + 1) * 4]
    return found
