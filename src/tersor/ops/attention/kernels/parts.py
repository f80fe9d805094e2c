"""Attention of one token in two kernels: parts of a cache each by programs of their own, then the parts joined.

A program has the heads that share keys and values, so these are read once. Blocks of places go to the parts in turn:
so programs have equally much to read, however much of a cache is filled. A program looks at the mask of all its blocks
before it asks for keys, and takes those from the first one on of which something is seen, up to the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@triton.jit
def seen_turns(mask, part, SEEN: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr, TURNS: tl.constexpr,
               SCAN: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first of a part's blocks with a place that is seen, and what follows the last one."""
    start = tl.full([], TURNS, tl.int32)
    stop = tl.full([], 0, tl.int32)
    for begin in range(0, TURNS, SCAN):
        turn = begin + tl.arange(0, SCAN)[:, None]
        place = (part + turn * PARTS) * BLOCK + tl.arange(0, BLOCK)[None, :]
        seen = tl.load(mask + place * SEEN, place < PLACES, other=0) != 0
        start = tl.minimum(start, tl.min(tl.where(seen, turn, TURNS)))
        stop = tl.maximum(stop, tl.max(tl.where(seen, turn + 1, 0)))
    return start, stop


@kernel
@triton.jit
def attend_parts(query, key, value, mask, peaks, totals, sums, factor, QUERY_LINE: tl.constexpr, QUERY: tl.constexpr,
                 KEY_LINE: tl.constexpr, KEY: tl.constexpr, KEY_PLACE: tl.constexpr, VALUE_LINE: tl.constexpr,
                 VALUE: tl.constexpr, VALUE_PLACE: tl.constexpr, SEEN_LINE: tl.constexpr, SEEN: tl.constexpr,
                 PLACES: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
                 PARTS: tl.constexpr, TURNS: tl.constexpr, SCAN: tl.constexpr, BLOCK: tl.constexpr,
                 ROWS: tl.constexpr):
    # Strides, `factor` and HEADS are those of `attend`. ROWS heads of a group are one program's. It writes, for each
    # of them, the largest score, the sum of weights under it, and the values' sum (sequence, group, part, head, …).
    # Products of half precision have every head twice: its weights, rounded, and what rounding lost of them.
    tl.extra.cuda.gdc_launch_dependents()
    HALVES: tl.constexpr = value.dtype.element_ty != tl.float32
    TWICE: tl.constexpr = 2 if HALVES else 1
    SHIFT: tl.constexpr = 15.0 if value.dtype.element_ty == tl.float16 else 0.0  # so small weights stay normal numbers
    part = tl.program_id(0)
    stream = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, TWICE * ROWS)
    row = tl.program_id(2) * ROWS + own % ROWS
    column = tl.arange(0, SIZE)
    near = tl.arange(0, BLOCK)
    line = stream // GROUPS
    group = stream % GROUPS
    key += line * KEY_LINE + group * KEY
    value += line * VALUE_LINE + group * VALUE
    mask += line * SEEN_LINE
    tl.extra.cuda.gdc_wait()  # the kernel before may still write what is attended to
    start, stop = seen_turns(mask, part, SEEN, PLACES, PARTS, TURNS, SCAN, BLOCK)
    wanted = tl.load(query + line * QUERY_LINE + (group * HEADS + row[:, None]) * QUERY + column[None, :],
                     (row < HEADS)[:, None], other=0.0)
    peak = tl.full([TWICE * ROWS], -float("inf"), tl.float32)
    total = tl.zeros([TWICE * ROWS, BLOCK], tl.float32)  # which threads sum up at the end
    found = tl.zeros([TWICE * ROWS, SIZE], tl.float32)
    for turn in range(start, stop):
        first = (part + turn * PARTS).to(tl.int64) * BLOCK
        place = first + near
        seen = tl.load(mask + place * SEEN, place < PLACES, other=0) != 0
        keys = tl.load(key + first * KEY_PLACE + (near[:, None] * KEY_PLACE + column[None, :]), seen[:, None],
                       other=0.0)
        values = tl.load(value + first * VALUE_PLACE + (near[:, None] * VALUE_PLACE + column[None, :]),
                         seen[:, None], other=0.0)
        scores = tl.dot(wanted, tl.trans(keys), input_precision="ieee") * factor
        scores = tl.where(seen[None, :], scores, -float("inf"))
        most = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(most == -float("inf"), 0.0, most)  # where all of the first blocks is hidden
        weights, before = tl.exp2(scores - base[:, None] + SHIFT), tl.exp2(peak - base)
        total = total * before[:, None] + weights
        if HALVES:
            lost = weights - weights.to(values.dtype).to(tl.float32)
            weights = tl.where((own < ROWS)[:, None], weights, lost)
        found = tl.dot(weights.to(values.dtype), values, found * before[:, None], input_precision="ieee")
        peak = most
    first = (stream * PARTS + part) * HEADS
    inside = (own < ROWS) & (row < HEADS)
    tl.store(peaks + first + row, peak, inside)
    tl.store(totals + first + row, tl.sum(total, 1), inside)
    found = tl.sum(tl.reshape(found, [TWICE, ROWS, SIZE]), 0)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    tl.store(sums + (first + row[:, None]) * SIZE + column[None, :], found, (row < HEADS)[:, None])


@kernel
@triton.jit
def join_parts(peaks, totals, sums, out, HEADS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
               ROOM: tl.constexpr, COLUMNS: tl.constexpr):
    """Write COLUMNS numbers of a head's attention from its parts, of which ROOM, a power of two, is at least as many."""
    tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, ROOM)
    at = (head // HEADS * PARTS + part) * HEADS + head % HEADS
    tl.extra.cuda.gdc_wait()
    peak = tl.load(peaks + at, part < PARTS, other=-float("inf"))
    total = tl.load(totals + at, part < PARTS, other=0.0)
    some = tl.load(sums + at[:, None] * SIZE + column[None, :], (part < PARTS)[:, None], other=0.0)
    most = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(most == -float("inf"), 0.0, most))
    found = tl.sum(some * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + head * SIZE + column, found.to(out.dtype.element_ty))
