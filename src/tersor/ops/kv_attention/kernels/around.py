"""What stands around attention over codes: queries taken to coordinates, and parts joined."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(float("-inf"))


@kernel
@triton.jit
def prepare(query, maps, bounds, offset, near, units, shifts, scaling, HEADS: tl.constexpr, ROWS: tl.constexpr,
            DIM: tl.constexpr, COUNT: tl.constexpr, MAPPED: tl.constexpr, PER_HEAD: tl.constexpr, SHIFTED: tl.constexpr,
            M: tl.constexpr, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """Write queries as codes meet them, half precision (part, M, COUNT), with their units and their scores of the offset.

    They come in the order of the codes of an element, CODES of them, then of elements: so programs read them in a row.

    Each is divided by a bound of its coordinates: 2-norms of the query and, in `bounds`, of the longest line of a map.
    """
    tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    head = part % HEADS
    row = tl.arange(0, M)
    place = tl.arange(0, DIM)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    q = tl.load(query + (part * ROWS + row[:, None]) * DIM + place[None, :], (row < ROWS)[:, None] & (place >= 0)[None, :],
                other=0.0).to(tl.float32)
    bound = tl.sqrt(tl.sum(q * q, 1))
    if MAPPED:
        side = maps + (head * COUNT * DIM if PER_HEAD else 0)
        lines = tl.load(side + column[:, None] * DIM + place[None, :])
        numbers = tl.dot(q, tl.trans(lines), input_precision="tf32x3")
        bound *= tl.load(bounds + (head if PER_HEAD else 0))
    else:
        numbers = tl.load(query + (part * ROWS + row[:, None]) * DIM + column[None, :],
                          (row < ROWS)[:, None] & (column >= 0)[None, :], other=0.0).to(tl.float32)
    inverse = tl.where(bound > 0.0, 1.0 / bound, 0.0)
    spot = column % CODES * (COUNT // CODES) + column // CODES
    tl.store(near + (part * M + row[:, None]) * COUNT + spot[None, :], (numbers * inverse[:, None]).to(tl.float16))
    if tl.program_id(1) == 0:
        shift = tl.zeros([M], tl.float32)
        if SHIFTED:
            shift = tl.sum(q * tl.load(offset + (head * DIM if PER_HEAD else 0) + place)[None, :], 1) * scaling
        tl.store(units + part * M + row, bound * scaling)
        tl.store(shifts + part * M + row, shift)


@triton.jit
def shares(sums, first, number, weight, splits, parts, place, column, ROWS: tl.constexpr, WIDE: tl.constexpr,
           COUNT: tl.constexpr):
    """Return the parts' sums of codes, COUNT of them, and of dense tokens at `column`, under weights."""
    at = first + number * ROWS
    coded = tl.load(sums + at[:, None] * WIDE + place[None, :], (number < splits)[:, None] & (place < COUNT)[None, :],
                    other=0.0)
    dense = tl.load(sums + at[:, None] * WIDE + column[None, :],
                    ((number >= splits) & (number < parts))[:, None] & (column >= 0)[None, :], other=0.0)
    return tl.sum(coded * weight[:, None], 0), tl.sum(dense * weight[:, None], 0)


@kernel
@triton.jit(do_not_specialize=["parts", "splits"])
def merge(peaks, totals, sums, maps, offset, aux, out, parts, splits, HEADS: tl.constexpr, ROWS: tl.constexpr,
          QUERIES: tl.constexpr, DIM: tl.constexpr, COUNT: tl.constexpr, ROOM: tl.constexpr, WIDE: tl.constexpr,
          MAPPED: tl.constexpr, PER_HEAD: tl.constexpr, SHIFTED: tl.constexpr, AUX: tl.constexpr, PARTS: tl.constexpr,
          TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Write attention (batch, queries, query heads, DIM) from the parts of every query, TILE of them at a time.

    Sums of codes are COUNT coordinates, which ROOM, a power of two, holds; a query has WIDE numbers in `sums`.
    """
    line = tl.program_id(0)
    part = line // ROWS
    row = line % ROWS
    head = part % HEADS
    place = tl.arange(0, ROOM)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if MAPPED:  # what no kernel writes is asked for before the parts are there
        turn = tl.load(maps + (head * COUNT * DIM if PER_HEAD else 0) + place[:, None] * DIM + column[None, :],
                       (place < COUNT)[:, None] & (column >= 0)[None, :], other=0.0)
    if SHIFTED:
        added = tl.load(offset + (head * DIM if PER_HEAD else 0) + column)
    tl.extra.cuda.gdc_wait()
    number = tl.arange(0, PARTS)
    first = part.to(tl.int64) * parts * ROWS + row
    peak = tl.load(peaks + first + number * ROWS, number < parts, other=NONE)
    share = tl.load(totals + first + number * ROWS, number < parts, other=0.0)
    most = tl.max(peak, 0)
    if AUX:
        extra = tl.load(aux + head * (ROWS // QUERIES) + row // QUERIES).to(tl.float32) * LOG2E
        most = tl.maximum(most, extra)
    base = tl.where(most == NONE, 0.0, most)
    weight = tl.exp2(peak - base)
    share *= weight
    total = tl.sum(share, 0)
    if AUX:
        total += tl.exp2(extra - base)
    if PARTS == TILE:
        coded, mixed = shares(sums, first, number, weight, splits, parts, place, column, ROWS, WIDE, COUNT)
    else:
        coded = tl.zeros([ROOM], tl.float32)
        mixed = tl.zeros([COLUMNS], tl.float32)
        for begin in range(0, parts, TILE):
            near = begin + tl.arange(0, TILE)
            own = tl.exp2(tl.load(peaks + first + near * ROWS, near < parts, other=NONE) - base)
            one, other = shares(sums, first, near, own, splits, parts, place, column, ROWS, WIDE, COUNT)
            coded += one
            mixed += other
    if MAPPED:
        mixed += tl.sum(coded[:, None] * turn, 0)
    else:
        mixed += tl.sum(tl.where(place[:, None] == column[None, :], coded[:, None], 0.0), 0)
    if SHIFTED:
        mixed += tl.sum(tl.where(number < splits, share, 0.0), 0) * added
    mixed /= tl.where(total == 0.0, 1.0, total)
    query = row % QUERIES
    group = row // QUERIES
    heads = HEADS * (ROWS // QUERIES)
    sequence = part // HEADS
    at = ((sequence.to(tl.int64) * QUERIES + query) * heads + head * (ROWS // QUERIES) + group) * DIM
    tl.store(out + at + column, mixed.to(out.dtype.element_ty))
