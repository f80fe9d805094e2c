"""What the scores of a tile's rows do not exceed, by one query or by many; and scores of single tiles, in float64."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.code_scan import shapes
from tersor.ops.dispatch import kernel

ROWS = tl.constexpr(shapes.TILE)
STEPS, TINY = tl.constexpr(shapes.STEPS), tl.constexpr(shapes.TINY)


@triton.jit
def _looked_up(own, held, SHIFT: tl.constexpr, SIZE: tl.constexpr):
    # what one of the rows in words of codes adds to its sum
    if SIZE == 16:
        low = tl.load(own + ((held >> SHIFT) & 15))
        return low + tl.load(own + 16 + ((held >> (SHIFT + 4)) & 15))
    else:
        return tl.load(own + ((held >> SHIFT) & (255 if SIZE == 256 else 65535)))


@triton.jit
def _more(base, weight, most, most_offset):
    # what may be lost where the parts of a score are put together
    size = tl.where(base > -float("inf"), tl.abs(base), 0.0)
    return STEPS * (most + most_offset * tl.abs(weight) + size) + TINY


@triton.jit
def _score(total, place, inside, factors, offsets, there, weight, slack):
    score = tl.load(factors + place, inside, other=0.0) * (total + slack)
    score += weight * tl.load(offsets + place, inside, other=0.0)
    return tl.where(tl.load(there + place, inside, other=0) != 0, score, -float("inf"))


@kernel
@triton.jit(do_not_specialize=["tiles", "pieces_count", "weight_query", "weight_piece"])
def bound_lookups(codes, tables, factors, offsets, there, pieces, weights, bases, whole, out, most_factor,
                  most_offset, step, tiles, pieces_count, weight_query, weight_piece, COLUMNS: tl.constexpr, LOOKUPS: tl.constexpr, SIZE: tl.constexpr,
                  BASED: tl.constexpr, TILES: tl.constexpr, EACH: tl.constexpr):
    """Tiles of codes and one query, whose float32 tables (lookups, size) are read where codes say.

    Codes come as words, int32 of `EACH` rows: one load, and what is looked up lies as the words do.
    """
    WORDS: tl.constexpr = ROWS // EACH
    lane = tl.arange(0, TILES * WORDS)
    tile = tl.program_id(0) * TILES + lane // WORDS
    query = tl.program_id(1).to(tl.int64)
    inside = tile < tiles
    piece = tl.load(pieces + tile, inside, other=0)
    base = tl.full((TILES * WORDS,), 0.0, tl.float32)
    if BASED:
        base = tl.load(bases + query * pieces_count + piece, inside, other=-float("inf")).to(tl.float32)
    score = tl.full((TILES * WORDS,), -float("inf"), tl.float32)
    if tl.max(base, 0) > -float("inf"):
        weight = tl.load(weights + query * weight_query + piece * weight_piece).to(tl.float32)
        first, second = tl.zeros((TILES * WORDS,), tl.float32), tl.zeros((TILES * WORDS,), tl.float32)
        third, fourth = tl.zeros((TILES * WORDS,), tl.float32), tl.zeros((TILES * WORDS,), tl.float32)
        at = codes + tile.to(tl.int64) * (COLUMNS * WORDS) + lane % WORDS
        own = tables + query * (LOOKUPS * SIZE)
        for column in tl.range(0, COLUMNS, loop_unroll_factor=8):
            held = tl.load(at + column * WORDS, inside, other=0)
            near = own + column * (LOOKUPS // COLUMNS * SIZE)
            first += _looked_up(near, held, 0, SIZE)
            second += _looked_up(near, held, 32 // EACH, SIZE)
            if EACH == 4:
                third += _looked_up(near, held, 16, SIZE)
                fourth += _looked_up(near, held, 24, SIZE)
        place, most = tile.to(tl.int64) * ROWS + lane % WORDS * EACH, tl.load(whole + query)
        slack = step * most
        score = tl.maximum(_score(first, place, inside, factors, offsets, there, weight, slack),
                           _score(second, place + 1, inside, factors, offsets, there, weight, slack))
        if EACH == 4:
            score = tl.maximum(score, _score(third, place + 2, inside, factors, offsets, there, weight, slack))
            score = tl.maximum(score, _score(fourth, place + 3, inside, factors, offsets, there, weight, slack))
        score += base + _more(base, weight, most_factor * most, most_offset)
    own_tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tl.store(out + query * tiles + own_tile, tl.max(tl.reshape(score, (TILES, WORDS)), 1), own_tile < tiles)


@triton.jit
def _signs(at, inside, first, COLUMNS: tl.constexpr, ACROSS: tl.constexpr, STEP: tl.constexpr):
    # so many signs of rows as float16
    column, bit = first // 8 + tl.arange(0, STEP // 8), tl.arange(0, 8)
    held = tl.load(at[:, None] + column[None, :] * ROWS, inside[:, None] & (column < COLUMNS)[None, :],
                   other=0).to(tl.int16)
    signs = (((held[:, :, None] << (15 - bit).to(tl.int16)[None, None, :]) & -0x8000) ^ -0x4400).to(tl.int16)
    return tl.reshape(signs, (ACROSS, STEP)).to(tl.float16, bitcast=True)  # 0xBC00 is -1, 0x3C00 is 1


@triton.jit
def _words(at, inside, books, first, WIDTH: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, EACH: tl.constexpr,
           STAGES: tl.constexpr, ACROSS: tl.constexpr, STEP: tl.constexpr):
    # so many numbers of rows as float16: sums of codewords
    number = first + tl.arange(0, STEP)
    known = inside[:, None] & (number < WIDTH)[None, :]
    found = tl.zeros((ACROSS, STEP), tl.float32)
    for stage in range(STAGES):
        lookup = number // EACH * STAGES + stage
        if SIZE == 16:
            held = tl.load(at[:, None] + (lookup // 2)[None, :] * ROWS, known, other=0).to(tl.int32)
            code = (held >> (lookup % 2 * 4)[None, :]) & 15
        else:
            code = tl.load(at[:, None] + lookup[None, :] * ROWS, known, other=0).to(tl.int32) & 0xFFFF
        place = (lookup * (WORDS * EACH) + number % EACH)[None, :] + code * EACH
        found += tl.load(books + place, known, other=0.0).to(tl.float32)
    return found.to(tl.float16)


@kernel
@triton.jit(do_not_specialize=["tiles", "queries", "pieces_count", "weight_query", "weight_piece"])
def bound_many(codes, products, books, units, lost, factors, offsets, there, pieces, weights, bases, whole, out,
               most_factor, most_offset, step, tiles, queries, wide, pieces_count, weight_query, weight_piece,
               COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, EACH: tl.constexpr,
               STAGES: tl.constexpr, BASED: tl.constexpr, TILES: tl.constexpr, QUERIES: tl.constexpr,
               STEP: tl.constexpr):
    """Tiles and many queries, whose float16 products (numbers, wide) are multiplied; `wide` pads queries.

    With signs, or with `WIDTH` numbers: codewords of `EACH` from float16 books (lookups, `WORDS`, `EACH`), summed over
    `STAGES`.
    """
    blocks = wide // QUERIES
    first = tl.program_id(0) // blocks * TILES
    row = tl.arange(0, TILES * ROWS)
    query = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    inside = first + row // ROWS < tiles
    at = codes + (first + row // ROWS).to(tl.int64) * (COLUMNS * ROWS) + row % ROWS
    number = tl.arange(0, STEP)
    total = tl.zeros((TILES * ROWS, QUERIES), tl.float32)
    known, own = query < queries, query.to(tl.int64)[None, :]
    tile = first + tl.arange(0, TILES)
    both = (tile < tiles)[:, None] & known[None, :]
    end = WIDTH
    if BASED:
        piece = tl.load(pieces + tile, tile < tiles, other=0)[:, None]
        base = tl.load(bases + own * pieces_count + piece, both, other=-float("inf")).to(tl.float32)
        end = tl.where(tl.max(tl.max(base, 1), 0) > -float("inf"), WIDTH, 0)  # none of the queries looks here
    for start in range(0, end, STEP):
        if EACH == 0:
            held = _signs(at, inside, start, COLUMNS, TILES * ROWS, STEP)
        else:
            held = _words(at, inside, books, start, WIDTH, SIZE, WORDS, EACH, STAGES, TILES * ROWS, STEP)
        near = tl.load(products + (start + number).to(tl.int64)[:, None] * wide + query[None, :])
        total = tl.dot(held, near, total)
    place = first.to(tl.int64) * ROWS + row
    is_there = tl.load(there + place, inside, other=0)
    factor = tl.load(factors + place, inside, other=0.0)
    offset = tl.load(offsets + place, inside, other=0.0)
    most, unit = tl.load(whole + query, known, other=0.0), tl.load(units + query, known, other=0.0)
    slack = step * most + tl.load(lost + query, known, other=0.0)
    score = factor[:, None] * (total * unit[None, :] + slack[None, :])
    if BASED:
        weight = tl.load(weights + own * weight_query + piece * weight_piece, both, other=0.0).to(tl.float32)
        lying = tl.reshape(score, (TILES, ROWS, QUERIES))
        more = base + _more(base, weight, most_factor * most[None, :], most_offset)
        lying += weight[:, None, :] * tl.reshape(offset, (TILES, ROWS))[:, :, None] + more[:, None, :]
    else:
        weight = tl.load(weights + query * weight_query, known, other=0.0).to(tl.float32)
        more = _more(weight * 0.0, weight, most_factor * most, most_offset)
        score += weight[None, :] * offset[:, None] + more[None, :]
        lying = tl.reshape(score, (TILES, ROWS, QUERIES))
    lying = tl.where((tl.reshape(is_there, (TILES, ROWS)) != 0)[:, :, None], lying, -float("inf"))
    tl.store(out + own * tiles + tile[:, None], tl.max(lying, 1), both)


@kernel
@triton.jit(do_not_specialize=["each", "pieces_count", "weight_query", "weight_piece"])
def score_tiles(codes, tables, factors, offsets, there, pieces, weights, bases, queries, chosen, out, each,
                pieces_count, weight_query, weight_piece, COLUMNS: tl.constexpr, LOOKUPS: tl.constexpr,
                SIZE: tl.constexpr, BASED: tl.constexpr, COUNTED: tl.constexpr):
    """One query and one tile, of pairs (n,) each: the scores of its rows, (n, 64), sums of float64 tables.

    `COUNTED`: the first `each` pairs are the first query's, and so on.
    """
    pair = tl.program_id(0).to(tl.int64)
    query, tile = (pair // each if COUNTED else tl.load(queries + pair)), tl.load(chosen + pair)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float64)
    own = tables + query * (LOOKUPS * SIZE)
    for column in range(COLUMNS):
        code = tl.load(codes + (tile * COLUMNS + column) * ROWS + row).to(tl.int32) & 0xFFFF
        if SIZE == 16:
            total += tl.load(own + column * 32 + (code & 15))
            total += tl.load(own + column * 32 + 16 + (code >> 4))
        else:
            total += tl.load(own + column * SIZE + code)
    piece = tl.load(pieces + tile)
    place = tile * ROWS + row
    weight = tl.load(weights + query * weight_query + piece * weight_piece)
    score = total * tl.load(factors + place).to(tl.float64) + weight * tl.load(offsets + place).to(tl.float64)
    if BASED:
        score += tl.load(bases + query * pieces_count + piece)
    tl.store(out + pair * ROWS + row, tl.where(tl.load(there + place) != 0, score, -float("inf")))
