"""Attention of few queries over closed tokens whose bytes name words; dense tokens as in `attending.py`.

Tables of words lie in shared memory, and what a byte names is an operand of the tensor cores as it is: no number is
computed. A warp takes turns of 32 tokens by itself. lookups.py says which lane has what.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels import lookups
from tersor.ops.kv_attention.kernels.arriving import line_of, place_of
from tersor.ops.kv_attention.kernels.attending import capped, over_dense, waited
from tersor.ops.kv_attention.kernels.meeting import finish
from tersor.ops.kv_attention.kernels.reading import load_row

NONE = gl.constexpr(float("-inf"))
LOG2E = gl.constexpr(1.4426950408889634)
TURN = gl.constexpr(32)
TILES = gl.constexpr(4)  # of eight tokens
UP = gl.constexpr(14.0)  # weights are multiplied by this power of two: half precision is finer there
KEPT, BEGUN, CHECKED, FROM = (gl.constexpr(text) for text in (lookups.KEPT, lookups.BEGUN, lookups.CHECKED, lookups.FROM))
WEIGHT = gl.constexpr(lookups.weight())
SUM, LARGEST = (gl.constexpr(lookups.quads(kind)) for kind in ("add.f32", "max.NaN.f32"))
MET, MIXED = (gl.constexpr(tuple(text(place, 8 << level, sets) for sets in (1, 2) for level in range(5) for place in range(4)))
              for text in (lookups.met, lookups.mixed))
given = gluon.constexpr_function(lookups.given)


@gluon.constexpr_function
def form(place: int, columns: int, sets: int) -> int:
    """Return which text of `MET` or `MIXED` is for a byte of a word, columns of tables, and sets of queries."""
    return ((sets - 1) * 5 + columns.bit_length() - 1) * 4 + place % 4


@gluon.constexpr_function
def floats(count: int) -> tuple:
    """Return the dtypes of so many sums."""
    return (gl.float32,) * count


@gluon.jit
def quad(number, KIND: gl.constexpr):
    """Return the sum or the largest of a number over four neighbouring lanes."""
    return gl.inline_asm_elementwise(KIND, "=&f,f", [number], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def shelved(tables, fills, thread, COLUMNS: gl.constexpr, SLOTS: gl.constexpr, SHARED: gl.constexpr,
            THREADS: gl.constexpr):
    """Allocate shared memory and fill it, eight entries of a thread at a time; return where it begins."""
    EACH: gl.constexpr = 256 * COLUMNS
    COUNT: gl.constexpr = SLOTS * EACH + SHARED * 256
    PAGES: gl.constexpr = SLOTS * EACH // THREADS
    RUN: gl.constexpr = 8 if PAGES % 8 == 0 else 1
    memory = gl.allocate_shared_memory(gl.int64, [(COUNT + THREADS - 1) // THREADS, THREADS],
                                       gl.SwizzledSharedLayout(1, 1, 1, [0]))
    first = gl.load(tables + (gl.load(fills + (thread // EACH * COLUMNS + thread % COLUMNS)) * 256
                              + thread // COLUMNS % 256))
    memory.index(0).store(first)
    gl.thread_barrier()
    start = gl.inline_asm_elementwise(BEGUN, "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1)
    gl.inline_asm_elementwise(CHECKED, "=r,r,l", [start + 8 * thread, first], dtype=gl.int32, is_pure=False, pack=1)
    for several in range(PAGES // RUN):
        entries, held = (), ()
        for page in gl.static_range(RUN):
            entry = (several * RUN + page) * THREADS + thread
            name = gl.load(fills + (entry // EACH * COLUMNS + entry % COLUMNS))
            entries = entries + (entry,)
            held = held + (gl.load(tables + (name * 256 + entry // COLUMNS % 256)),)
        for page in gl.static_range(RUN):
            gl.inline_asm_elementwise(KEPT, "=r,r,l", [start + entries[page] * 8, held[page]], dtype=gl.int32,
                                      is_pure=False, pack=1)
    for turn in gl.static_range(SHARED):
        table = tables + gl.load(fills + (SLOTS * COLUMNS + turn)) * 256
        for page in gl.static_range((256 + THREADS - 1) // THREADS):
            name = (page * THREADS + thread) % 256
            gl.inline_asm_elementwise(KEPT, "=r,r,l", [start + (SLOTS * EACH + turn * 256 + name) * 8,
                                                       gl.load(table + name)], dtype=gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()
    return start


@gluon.jit
def load_bases(bases, start, lane, FIRST: gl.constexpr, STEPS: gl.constexpr):
    """Return where in shared memory a lane's lookups begin."""
    found = ()
    for step in gl.static_range(STEPS):
        found = found + (gl.load(bases + ((FIRST + step) * 32 + lane)) + start,)
    return found


@gluon.jit
def load_queries(near, units, shifts, part, row, lane, R: gl.constexpr, STEPS: gl.constexpr, SETS: gl.constexpr):
    """Return the registers of a lane's queries, step by step and set by set, and their units and shifts, set by set.

    `near` has pairs of numbers of half precision: (part, R, step, 4 lookups, 2).
    """
    queries, unit, shift = (), (), ()
    for step in gl.static_range(STEPS):
        for turn in gl.static_range(SETS):
            at = near + (((part * R + row + 4 * turn) * STEPS + step) * 8 + (lane & 3) * 2)
            queries = queries + (gl.load(at), gl.load(at + 1))
    for turn in gl.static_range(SETS):
        unit = unit + (gl.load(units + (part * R + row + 4 * turn)),)
        shift = shift + (gl.load(shifts + (part * R + row + 4 * turn)),)
    return queries, unit, shift


@gluon.jit
def load_turn(words, far, line, token, lane, BLOCK: gl.constexpr, ROW: gl.constexpr, EACH: gl.constexpr,
              KEYS: gl.constexpr):
    """Return a lane's words of a turn's rows, tile by tile: of one token of keys, of two of values."""
    found = ()
    first = line * BLOCK + (token & (BLOCK - 1))
    for tile in gl.static_range(TILES):
        if KEYS:
            found = found + load_row(words, far, (first + 8 * tile + (lane >> 2)) * ROW + (lane & 3) * EACH, ROW, EACH)
        else:
            group = lane >> 2
            own = ((group & 3) * 2 + (group >> 2)) * EACH
            for which in gl.static_range(2):
                row = first + 8 * tile + 2 * (lane & 3) + which
                found = found + load_row(words, far, row * ROW + own, ROW, EACH)
    return found


@gluon.jit
def scored(words, bases, queries, unit, shift, bias, softcap, zero, STEPS: gl.constexpr, TALL: gl.constexpr,
           EACH: gl.constexpr, PLACES: gl.constexpr, SETS: gl.constexpr, CAPPED: gl.constexpr):
    """Return scores, set by set and tile by tile, of two tokens each."""
    WORDS: gl.constexpr = (EACH + 3) // 4
    found = ()
    for tile in gl.static_range(TILES):
        sums = (zero, zero, zero, zero)
        for step in gl.static_range(STEPS):
            sums = gl.inline_asm_elementwise(
                MET[form(PLACES[step], TALL[step], SETS)], given(4, 2 + 2 * SETS, 4),
                (words[tile * WORDS + PLACES[step] // 4], bases[step]) + queries[2 * SETS * step : 2 * SETS * (step + 1)]
                + sums, dtype=floats(4), is_pure=True, pack=1)
        found = found + sums
    scores = ()
    for turn in gl.static_range(SETS):
        for tile in gl.static_range(TILES):
            for which in gl.static_range(2):
                score = found[4 * tile + 2 * turn + which] * unit[turn]
                if CAPPED:
                    scores = scores + (capped(score + shift[turn], softcap, CAPPED) + bias,)
                else:
                    scores = scores + (score + (shift[turn] + bias),)
    return scores


@gluon.jit
def masked(scores, mask, token, inside, row, head, lane, steps, ROWS: gl.constexpr, QUERIES: gl.constexpr,
           MASK: gl.constexpr):
    """Return scores of a set under the mask of a turn's tokens, from `token` on."""
    if MASK == "none":
        return scores
    else:
        found = ()
        first = mask + (head * (ROWS // QUERIES) + row // QUERIES) * steps[0] + row % QUERIES * steps[1]
        for tile in gl.static_range(TILES):
            for which in gl.static_range(2):
                at = first + (token + 8 * tile + 2 * (lane & 3) + which) * steps[2]
                score = scores[2 * tile + which]
                if MASK == "bool":
                    found = found + (gl.where(gl.load(at, inside & (row < ROWS), other=0) != 0, score, NONE),)
                else:
                    found = found + (score + gl.load(at, inside & (row < ROWS), other=0.0).to(gl.float32) * LOG2E,)
        return found


@gluon.jit
def weighed(scores, peak, total):
    """Return weights of a set's scores, 2**UP the largest so far, what sums shrink by, the new peak and sum of weights."""
    most = scores[0]
    for place in gl.static_range(1, 2 * TILES):
        most = gl.maximum(most, scores[place])
    fresh = gl.maximum(peak, quad(most, LARGEST))
    base = gl.where(fresh == NONE, 0.0, fresh)
    shrink = gl.exp2(peak - base)
    base = base - UP
    total = total * shrink
    weights = ()
    for place in gl.static_range(2 * TILES):
        weight = gl.exp2(scores[place] - base)
        total = total + weight
        weights = weights + (weight,)
    return weights, shrink, fresh, total


@gluon.jit
def from_lane(number, lane):
    """Return the number of another lane."""
    return gl.inline_asm_elementwise(FROM, "=r,r,r", [number, lane], dtype=number.dtype, is_pure=False, pack=1)


@gluon.jit
def added(acc, words, bases, weights, shrinks, STEPS: gl.constexpr, TALL: gl.constexpr, EACH: gl.constexpr,
          PLACES: gl.constexpr, SETS: gl.constexpr):
    """Return sums of words, step by step and set by set, plus those of a turn."""
    WORDS: gl.constexpr = (EACH + 3) // 4
    found = ()
    for step in gl.static_range(STEPS):
        sums = ()
        for turn in gl.static_range(SETS):
            for number in gl.static_range(4):
                sums = sums + (acc[4 * (SETS * step + turn) + number] * shrinks[turn],)
        for tile in gl.static_range(TILES):
            columns = ()
            for turn in gl.static_range(SETS):
                for which in gl.static_range(2):
                    columns = columns + (weights[2 * (TILES * turn + tile) + which],)
            sums = gl.inline_asm_elementwise(
                MIXED[form(PLACES[step], TALL[step], SETS)], given(4 * SETS, 3 + 2 * SETS, 4 * SETS),
                (words[2 * tile * WORDS + PLACES[step] // 4], words[(2 * tile + 1) * WORDS + PLACES[step] // 4], bases[step])
                + columns + sums, dtype=floats(4 * SETS), is_pure=True, pack=1)
        found = found + sums
    return found


@gluon.jit
def halved(weights, half):
    """Return weights of half precision in their half of a word."""
    found = ()
    for place in gl.static_range(len(weights)):
        found = found + (gl.inline_asm_elementwise(WEIGHT, "=&r,f,r", [weights[place], half], dtype=gl.int32,
                                                   is_pure=True, pack=1),)
    return found


@gluon.jit
def same(number, COUNT: gl.constexpr):
    """Return a number so many times."""
    found = ()
    for _ in gl.static_range(COUNT):
        found = found + (number,)
    return found


@gluon.jit
def ended(acc, peak, total, lane, first_row, at, peaks, totals, sums, ROWS: gl.constexpr, WIDE: gl.constexpr,
          STEPS: gl.constexpr, SETS: gl.constexpr, S: gl.constexpr):
    """Join the warps' sums and write them."""
    gl.thread_barrier()  # they pass through shared memory, where tables were
    for turn in gl.static_range(SETS):
        own = ()
        for step in gl.static_range(STEPS):
            own = own + acc[4 * (SETS * step + turn) : 4 * (SETS * step + turn + 1)]
        most = from_lane(peak[turn], (lane & 3) * 8) - UP
        whole = from_lane(quad(total[turn], SUM), (lane & 3) * 8)
        finish(own, most, gl.where(lane < 4, whole, 0.0), first_row + 4 * turn, at, peaks, totals, sums, ROWS, WIDE,
               32 * STEPS, S)


@gluon.jit
def over_words(split, splits, at, head, sequence, first_row, asked, tables, sources, mask, softcap, peaks, totals, sums,
               middle, batch, early, steps, HEADS: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr,
               BLOCK: gl.constexpr, PAGE: gl.constexpr, KEY: gl.constexpr, VALUE: gl.constexpr, SHELF: gl.constexpr,
               WIDE: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr, R: gl.constexpr, SETS: gl.constexpr,
               S: gl.constexpr):
    """Attend to the turns of closed tokens that are this program's; KEY and VALUE: bytes of a row, of a lane, steps, columns."""
    KEY_PLACES: gl.constexpr = KEY[2]
    VALUE_PLACES: gl.constexpr = VALUE[2]
    KEY_TALL: gl.constexpr = KEY[3]
    VALUE_TALL: gl.constexpr = VALUE[3]
    KEY_STEPS: gl.constexpr = len(KEY_PLACES)
    STEPS: gl.constexpr = len(VALUE_PLACES)
    thread = gl.arange(0, 32 * S, layout=gl.BlockedLayout([1], [32], [S], [0]))
    lane = thread & 31
    row = first_row + (lane >> 3)
    start = (split * S + (thread >> 5)) * TURN
    token = gl.where(start < middle, start, 0)  # turns that are none read the first one's
    line = line_of(token, head, HEADS, BLOCK, PAGE)
    keys = load_turn(sources[0], place_of(sources[2], token, batch, sequence, BLOCK, PAGE), line, token, lane, BLOCK,
                     KEY[0], KEY[1], True)
    values = load_turn(sources[1], place_of(sources[3], token, batch, sequence, BLOCK, PAGE), line, token, lane, BLOCK,
                       VALUE[0], VALUE[1], False)
    base = shelved(tables[0], tables[1], thread, SHELF[0], SHELF[1], SHELF[2], 32 * S)
    key_bases = load_bases(tables[2], base, lane, 0, KEY_STEPS)
    value_bases = load_bases(tables[2], base, lane, KEY_STEPS, STEPS)
    queries, unit, shift = load_queries(asked[0], asked[1], asked[2], sequence * HEADS + head + waited(), row, lane, R,
                                        KEY_STEPS, SETS)
    half = gl.where((lane & 4) == 0, 65535, -65536)
    zero = gl.zeros_like(unit[0])
    peak = same(zero + NONE, SETS)
    total = same(zero, SETS)
    acc = same(zero, 4 * SETS * STEPS)
    for _ in range(0, ((middle + TURN - 1) // TURN + splits * S - 1) // (splits * S)):
        inside = start < middle
        bias = gl.where(inside, 0.0, NONE)
        here = early + token
        start += splits * (S * TURN)
        token = gl.where(start < middle, start, 0)
        line = line_of(token, head, HEADS, BLOCK, PAGE)
        near = place_of(sources[2], token, batch, sequence, BLOCK, PAGE)
        far = place_of(sources[3], token, batch, sequence, BLOCK, PAGE)
        every = scored(keys, key_bases, queries, unit, shift, bias, softcap, zero, KEY_STEPS, KEY_TALL, KEY[1],
                       KEY_PLACES, SETS, CAPPED)
        keys = load_turn(sources[0], near, line, token, lane, BLOCK, KEY[0], KEY[1], True)
        weights, shrinks, fresh, whole = (), (), (), ()
        for turn in gl.static_range(SETS):
            scores = masked(every[2 * TILES * turn : 2 * TILES * (turn + 1)], mask, here, inside, row + 4 * turn, head,
                            lane, steps, ROWS, QUERIES, MASK)
            some, shrink, most, sum_of = weighed(scores, peak[turn], total[turn])
            weights = weights + halved(some, half)
            shrinks = shrinks + (from_lane(shrink, (lane & 3) * 8),)
            fresh, whole = fresh + (most,), whole + (sum_of,)
        peak, total = fresh, whole
        acc = added(acc, values, value_bases, weights, shrinks, STEPS, VALUE_TALL, VALUE[1], VALUE_PLACES, SETS)
        values = load_turn(sources[1], far, line, token, lane, BLOCK, VALUE[0], VALUE[1], False)
    ended(acc, peak, total, lane, first_row, at, peaks, totals, sums, ROWS, WIDE, STEPS, SETS, S)


@kernel
@gluon.jit(do_not_specialize=["middle", "sinks", "recent", "mask_batch", "mask_head", "mask_query", "mask_token",
                                "splits", "softcap"])
def attend_words(query, near, units, shifts, key_words, value_words, key_pages, value_pages, tables, fills, bases,
                 sink_keys, sink_values, tail_keys, tail_values, mask, softcap, scaling, peaks, totals, sums,
                 counts, middle, sinks, recent, batch, sink_batch, sink_head, sink_token, tail_batch, tail_head,
                 tail_token, sink_batch_v, sink_head_v, sink_token_v, tail_batch_v, tail_head_v, tail_token_v, mask_batch,
                 mask_head, mask_query, mask_token, splits, HEADS: gl.constexpr, ROWS: gl.constexpr,
                 QUERIES: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr, KEY: gl.constexpr,
                 VALUE: gl.constexpr, SHELF: gl.constexpr, WIDE: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr,
                 CAUSAL: gl.constexpr, COUNTED: gl.constexpr, SETS: gl.constexpr, R: gl.constexpr,
                 N_DENSE: gl.constexpr, S: gl.constexpr):
    """As `attend`, over bytes that name words; programs of the third axis have other queries, 4 SETS each."""
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
    if split < splits:
        over_words(split, splits, at, head, sequence, gl.program_id(2) * (4 * SETS), (near, units, shifts),
                   (tables, fills, bases), (key_words, value_words, key_pages, value_pages), mask,
                   softcap, peaks, totals, sums, middle, batch, sinks, (mask_head, mask_query, mask_token), HEADS, ROWS,
                   QUERIES, BLOCK, PAGE, KEY, VALUE, SHELF, WIDE, MASK, CAPPED, R, SETS, S)
    elif gl.program_id(2) == 0:
        strides = (sink_batch, sink_head, sink_token, tail_batch, tail_head, tail_token, sink_batch_v, sink_head_v,
                   sink_token_v, tail_batch_v, tail_head_v, tail_token_v)
        over_dense(split - splits, at, head, sequence, query, sink_keys, sink_values, tail_keys, tail_values, mask,
                   softcap, scaling, peaks, totals, sums, middle, sinks, recent, strides, mask_head, mask_query,
                   mask_token, mma, HEADS, ROWS, QUERIES, DIM, WIDE, MASK, CAPPED, CAUSAL, R, N_DENSE, S)
