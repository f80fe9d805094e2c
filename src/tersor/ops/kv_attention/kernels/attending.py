"""Attention of few queries over a part of the tokens: closed tokens as codes, or dense ones.

A program takes some tokens of one head of one sequence; its warps take turns of N tokens and keep softmaxes of their
own, which are joined at the end. Scores are in powers of two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from tersor.ops.dispatch import kernel
from tersor.ops.kv_attention.kernels.decoding import codes_of, decoded, is_wide, load_table, load_words
from tersor.ops.kv_attention.kernels.ring import ask, lines_of, make_rings, row_of, take

LOG2E = gl.constexpr(1.4426950408889634)
NONE = gl.constexpr(float("-inf"))
STAGES = gl.constexpr(3)  # chunks in the ring; all but one are on their way


@gluon.constexpr_function
def plain(layout, axis: int):
    """Return the layout of the indices along one of three axes."""
    if axis == 0:
        return gl.SliceLayout(1, gl.SliceLayout(2, layout))
    return gl.SliceLayout(0, gl.SliceLayout(2 if axis == 1 else 1, layout))


@gluon.jit
def along(count: gl.constexpr, layout: gl.constexpr, axis: gl.constexpr):
    """Return indices along an axis of three."""
    index = gl.arange(0, count, layout=plain(layout, axis))
    if axis == 0:
        return index[:, None, None]
    elif axis == 1:
        return index[None, :, None]
    else:
        return index[None, None, :]


@gluon.jit
def waited():
    """Return 0 once the kernel before this one has ended: it made the queries that codes meet."""
    return 16 * gl.inline_asm_elementwise("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;", "=r",
                                          [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ahead():
    """Return 0, and let the next kernel start; what this one reads was there before the kernel before it began."""
    return gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32,
                                     is_pure=False, pack=1)


@gluon.jit
def joined(parts):
    """Return tensors joined along new last axes, in order; there are 4, 8 or 16."""
    if len(parts) == 16:
        pairs = (gl.join(parts[0], parts[8]), gl.join(parts[1], parts[9]), gl.join(parts[2], parts[10]),
                 gl.join(parts[3], parts[11]), gl.join(parts[4], parts[12]), gl.join(parts[5], parts[13]),
                 gl.join(parts[6], parts[14]), gl.join(parts[7], parts[15]))
    else:
        pairs = parts
    if len(parts) >= 8:
        fours = (gl.join(pairs[0], pairs[4]), gl.join(pairs[1], pairs[5]), gl.join(pairs[2], pairs[6]),
                 gl.join(pairs[3], pairs[7]))
    else:
        fours = pairs
    return gl.join(gl.join(fours[0], fours[2]), gl.join(fours[1], fours[3]))


@gluon.jit
def rows_of(parts, S: gl.constexpr, K: gl.constexpr, N: gl.constexpr):
    """Return numbers of codes, each (S, elements, N), as (S, K, N): lines go by codes, then elements."""
    every = joined(parts)
    if len(parts) == 16:
        every = every.permute([0, 3, 4, 5, 6, 1, 2])
    elif len(parts) == 8:
        every = every.permute([0, 3, 4, 5, 1, 2])
    else:
        every = every.permute([0, 3, 4, 1, 2])
    return every.reshape([S, K, N])


@gluon.jit
def columns_of(parts, S: gl.constexpr, K: gl.constexpr, N: gl.constexpr):
    """Return numbers of codes, each (S, K, elements), as (S, K, N): columns go by codes, then elements."""
    every = joined(parts)
    if len(parts) == 16:
        every = every.permute([0, 1, 3, 4, 5, 6, 2])
    elif len(parts) == 8:
        every = every.permute([0, 1, 3, 4, 5, 2])
    else:
        every = every.permute([0, 1, 3, 4, 2])
    return every.reshape([S, K, N])


@gluon.jit
def masked(scores, mask, place, row, head, mask_head, mask_query, mask_token, ROWS: gl.constexpr, QUERIES: gl.constexpr,
           MASK: gl.constexpr):
    """Return scores under the mask of tokens `place`, (S, N, 1); `mask` points to that of the sequence."""
    if MASK == "none":
        return scores
    else:
        at = mask + (head + row // QUERIES) * mask_head + row % QUERIES * mask_query + place * mask_token
        if MASK == "bool":
            seen = gl.load(at, (row < ROWS) & (place >= 0), other=1)
            return gl.where(seen != 0, scores, NONE)
        else:
            return scores + gl.load(at, (row < ROWS) & (place >= 0), other=0.0).to(gl.float32) * LOG2E


@gluon.jit
def capped(scores, softcap, CAPPED: gl.constexpr):
    """Return scores as they are, in powers of two, or natural ones after the soft cap, then in powers of two."""
    if CAPPED:
        turned = gl.exp2(gl.minimum(scores * (2.0 * LOG2E) / softcap, 60.0))
        return (turned - 1.0) / (turned + 1.0) * (softcap * LOG2E)
    else:
        return scores


@gluon.jit
def weighed(scores, peak, total):
    """Return the weights of scores (S, N, R), the new peaks, what earlier sums shrink by, and the new sum of weights."""
    fresh = gl.maximum(peak, gl.max(scores, 1))
    base = gl.where(fresh == NONE, 0.0, fresh)
    shrink = gl.exp2(peak - base)
    weights = gl.exp2(scores - base[:, None, :])
    return weights, fresh, shrink, total * shrink + gl.sum(weights, 1)


@gluon.jit
def finish(acc, peak, total, unit, at, peaks, totals, sums, ROWS: gl.constexpr, DIM: gl.constexpr, WIDE: gl.constexpr,
           R: gl.constexpr, S: gl.constexpr, CODES: gl.constexpr):
    """Join the warps' sums (S, DIM, R) and write them, WIDE a query; `at`: the number of the part.

    Lines go by CODES, then elements.
    """
    most = gl.max(peak, 0)
    base = gl.where(most == NONE, 0.0, most)
    share = gl.exp2(peak - base[None, :])
    whole = gl.sum(total * share, 0)
    row = gl.arange(0, R, layout=whole.type.layout)
    gl.store(peaks + at * ROWS + row, most, row < ROWS)
    gl.store(totals + at * ROWS + row, whole, row < ROWS)
    mixed = gl.sum(acc * (share[:, None, :] * unit), 0)
    mixed = mixed.reshape([CODES, DIM // CODES, R]).permute([2, 1, 0]).reshape([R, DIM])
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [S, 1], [1, 0])
    mixed = gl.convert_layout(mixed, flat)
    rows = gl.arange(0, R, layout=gl.SliceLayout(1, flat))[:, None]
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, flat))[None, :]
    gl.store(sums + (at * ROWS + rows) * WIDE + column, mixed, (rows < ROWS) & (column >= 0))


@gluon.constexpr_function
def run_of(bits: int, dim: int) -> int:
    """Return how many elements of a key a lane has in a row."""
    return 4 if dim // codes_of(bits, dim) >= 16 else 2


@gluon.jit
def fetch(chunk, middle, sources, batch, sequence, head, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
          KEYS: gl.constexpr, VALUES: gl.constexpr, DIM: gl.constexpr, mma: gl.constexpr, S: gl.constexpr,
          N: gl.constexpr):
    """Return elements and scales of the keys and the values of a chunk, S turns of N tokens, without a ring."""
    key_words, value_words, key_pages, value_pages, key_room, value_room = sources
    lk: gl.constexpr = gl.DotOperandLayout(0, mma, run_of(KEYS, DIM))
    lv: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    COUNT_K: gl.constexpr = DIM // codes_of(KEYS, DIM)
    COUNT_V: gl.constexpr = DIM // codes_of(VALUES, DIM)
    codes, scales = lines_of(key_words, key_pages, chunk, batch, sequence, KEYS, HEADS, BLOCK, PAGE, DIM, S * N)
    rows = (row_of(along(S, lk, 0) * N, head, HEADS, BLOCK),
            row_of(along(S, lv, 0) * N, head, HEADS, BLOCK),
            row_of(along(S, mma, 0) * N, head, HEADS, BLOCK))
    there = (chunk * S + along(S, lk, 0)) * N < middle
    keys = load_words(codes, rows[0] + along(N, lk, 1), along(COUNT_K, lk, 2), there & (along(COUNT_K, lk, 2) >= 0), KEYS,
                      is_wide(KEYS, DIM), COUNT_K)
    key_scale = load_scales(scales + key_room, rows[2], chunk, middle, mma, S, N)
    codes, scales = lines_of(value_words, value_pages, chunk, batch, sequence, VALUES, HEADS, BLOCK, PAGE, DIM, S * N)
    there = (chunk * S + along(S, lv, 0)) * N < middle
    values = load_words(codes, rows[1] + along(N, lv, 2), along(COUNT_V, lv, 1), there & (along(COUNT_V, lv, 1) >= 0),
                        VALUES, is_wide(VALUES, DIM), COUNT_V)
    value_scale = load_scales(scales + value_room, rows[2], chunk, middle, mma, S, N)
    return keys, key_scale, values, value_scale


@gluon.jit
def load_scales(scales, rows, chunk, middle, mma: gl.constexpr, S: gl.constexpr, N: gl.constexpr):
    """Return scales of a chunk's tokens, (S, N, 1)."""
    there = (chunk * S + along(S, mma, 0)) * N < middle
    at = scales.to(gl.pointer_type(gl.bfloat16), bitcast=True) + (rows + along(N, mma, 1))
    return gl.load(at, there & (along(N, mma, 1) >= 0), other=0.0).to(gl.float32)


@gluon.jit
def load_queries(near, KEYS: gl.constexpr, DIM: gl.constexpr, mma: gl.constexpr, R: gl.constexpr, S: gl.constexpr):
    """Return queries, in the order of numbers of keys."""
    layout: gl.constexpr = gl.DotOperandLayout(1, mma, run_of(KEYS, DIM))
    k = along(DIM, layout, 1)
    return gl.load(near + along(R, layout, 2) * DIM + k, (along(S, layout, 0) >= 0) & (k >= 0))


@gluon.jit
def scored(keys, unit, shift, bias, queries, table, softcap, KEYS: gl.constexpr, DIM: gl.constexpr,
           CAPPED: gl.constexpr, layout: gl.constexpr, mma: gl.constexpr, R: gl.constexpr, N: gl.constexpr,
           S: gl.constexpr):
    """Return scores (S, N, R); `bias` is -inf for turns beyond the last token: blocks have N tokens or more."""
    numbers = columns_of(decoded(keys, table, KEYS, is_wide(KEYS, DIM)), S, N, DIM)
    found = mma_v2(gl.convert_layout(numbers, layout, assert_trivial=True), queries,
                   gl.zeros([S, N, R], gl.float32, mma))
    if CAPPED:
        return capped(found * unit + shift, softcap, CAPPED) + bias
    else:
        return found * unit + (shift + bias)


@gluon.jit
def over_codes(split, splits, at, head, sequence, near, units, shifts, sources, key_table, value_table, mask, softcap, peaks, totals, sums, middle, batch, early,
               mask_head, mask_query, mask_token, mma: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr,
               QUERIES: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr,
               VALUES: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr, R: gl.constexpr, N: gl.constexpr,
               S: gl.constexpr):
    """Attend to the chunks of closed tokens that are this program's."""
    RING: gl.constexpr = KEYS != 3 and VALUES != 3
    lk: gl.constexpr = gl.DotOperandLayout(0, mma, run_of(KEYS, DIM))
    lv: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    lw: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    CODES_V: gl.constexpr = codes_of(VALUES, DIM)
    chunks = (middle + S * N - 1) // (S * N)
    begin = split * ((chunks + splits - 1) // splits)
    end = gl.minimum(begin + (chunks + splits - 1) // splits, chunks)
    if RING:
        rings = make_rings(KEYS, VALUES, DIM, S, N, STAGES)
        for step in gl.static_range(STAGES - 1):
            ask(rings, step, begin + step, begin + step < end, middle, sources, batch, sequence, head, HEADS, BLOCK, PAGE,
                KEYS, VALUES, DIM, S, N)
    else:
        held = fetch(gl.minimum(begin, gl.maximum(chunks - 1, 0)), middle, sources, batch, sequence, head, HEADS, BLOCK,
                     PAGE, KEYS, VALUES, DIM, mma, S, N)
    ready = waited()
    part = sequence * HEADS + head
    queries = load_queries(near + ready + part * R * DIM, KEYS, DIM, mma, R, S)
    near_table = load_table(key_table, along(S, lk, 0))
    far_table = load_table(value_table, along(S, lv, 0))
    row = along(R, mma, 2)
    unit = gl.load(units + ready + part * R + row)
    shift = gl.load(shifts + ready + part * R + row)
    peak = gl.full([S, R], NONE, gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([S, R], gl.float32, gl.SliceLayout(1, mma))
    size = gl.zeros([S, 1, 1], gl.float32, mma) + 1e-30
    acc = gl.zeros([S, DIM, R], gl.float32, mma)
    for chunk in range(begin, end):
        if RING:
            index = chunk - begin
            async_copy.wait_group(STAGES - 2)
            keys, key_scale, values, value_scale = take(rings, index % STAGES, KEYS, VALUES, DIM, lk, lv, mma, S, N)
            ask(rings, (index + STAGES - 1) % STAGES, chunk + STAGES - 1, chunk + STAGES - 1 < end, middle, sources, batch,
                sequence, head, HEADS, BLOCK, PAGE, KEYS, VALUES, DIM, S, N)
        else:
            keys, key_scale, values, value_scale = held
            held = fetch(gl.minimum(chunk + 1, end - 1), middle, sources, batch, sequence, head, HEADS, BLOCK, PAGE, KEYS,
                         VALUES, DIM, mma, S, N)
        start = (chunk * S + along(S, mma, 0)) * N
        scores = scored(keys, unit * key_scale, shift, gl.where(start < middle, 0.0, NONE), queries, near_table, softcap,
                        KEYS, DIM, CAPPED, lk, mma, R, N, S)
        place = early + gl.minimum(start, middle - N) + along(N, mma, 1)
        scores = masked(scores, mask, place, row, head * (ROWS // QUERIES), mask_head, mask_query, mask_token, ROWS,
                        QUERIES, MASK)
        weights, peak, shrink, total = weighed(scores, peak, total)
        # weights times scales, the largest scale so far as one, stay within half precision
        grown = gl.maximum(size, gl.max(value_scale, 1)[:, None, :])
        acc = acc * (shrink[:, None, :] * (size / grown))
        size = grown
        acc = mma_v2(gl.convert_layout(rows_of(decoded(values, far_table, VALUES, is_wide(VALUES, DIM)), S, DIM, N),
                                       lv, assert_trivial=True),
                     gl.convert_layout((weights * (value_scale / size)).to(gl.float16), lw), acc)
    finish(acc, peak, total, size, at, peaks, totals, sums, ROWS, DIM, DIM, R, S, CODES_V)


@gluon.jit
def over_dense(split, at, head, sequence, query, sink_keys, sink_values, tail_keys, tail_values, mask, softcap, scaling,
               peaks, totals, sums, middle, sinks, recent, strides, mask_head, mask_query, mask_token,
               mma: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr,
               WIDE: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr, CAUSAL: gl.constexpr, R: gl.constexpr,
               N: gl.constexpr, S: gl.constexpr):
    """Attend to S N of the dense tokens: sinks, then recent ones."""
    la: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    lb: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    flat: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // (DIM // 8), DIM // 8], [S, 1, 1], [2, 1, 0])
    part = sequence * HEADS + head + ahead()
    r = along(R, lb, 2)
    queries = gl.load(query + (part * ROWS + r) * DIM + along(DIM, lb, 1), (r < ROWS) & (along(S, lb, 0) >= 0), other=0.0)
    count = sinks + recent
    key = dense_tile(sink_keys, tail_keys, split, sequence, head, sinks, count, strides[0], strides[1], strides[2],
                     strides[3], strides[4], strides[5], flat, N, S, DIM)
    value = dense_tile(sink_values, tail_values, split, sequence, head, sinks, count, strides[6], strides[7], strides[8],
                       strides[9], strides[10], strides[11], flat, N, S, DIM)
    scores = mma_v2(gl.convert_layout(key, la), queries, gl.zeros([S, N, R], gl.float32, mma))
    scores = capped(scores * scaling, softcap, CAPPED)
    row = along(R, mma, 2)
    index = (split * S + along(S, mma, 0)) * N + along(N, mma, 1)
    inside = index < count
    place = gl.where(index < sinks, index, index + middle)
    scores = masked(scores, mask, gl.where(inside, place, 0), row, head * (ROWS // QUERIES), mask_head, mask_query,
                    mask_token, ROWS, QUERIES, MASK)
    if CAUSAL:
        inside = inside & (place <= count + middle - QUERIES + row % QUERIES)
    scores = gl.where(inside, scores, NONE)
    peak = gl.full([S, R], NONE, gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([S, R], gl.float32, gl.SliceLayout(1, mma))
    weights, peak, _shrink, total = weighed(scores, peak, total)
    mixing = gl.convert_layout(weights.to(query.dtype.element_ty), lb)
    acc = mma_v2(gl.convert_layout(value.permute([0, 2, 1]), la), mixing, gl.zeros([S, DIM, R], gl.float32, mma))
    finish(acc, peak, total, 1.0, at, peaks, totals, sums, ROWS, DIM, WIDE, R, S, 1)


@gluon.jit
def dense_tile(sinks_at, tail_at, split, sequence, head, sinks, count, sink_batch, sink_head, sink_token, batch_step,
               head_step, token_step, layout: gl.constexpr, N: gl.constexpr, S: gl.constexpr, DIM: gl.constexpr):
    """Return dense tokens (S, N, DIM)."""
    index = (split * S + along(S, layout, 0)) * N + along(N, layout, 1)
    column = along(DIM, layout, 2)
    early = sinks_at + (sequence.to(gl.int64) * sink_batch + head * sink_head + index * sink_token + column)
    late = tail_at + (sequence.to(gl.int64) * batch_step + head * head_step + (index - sinks) * token_step + column)
    return gl.load(gl.where((index < sinks) & (column >= 0), early, late), (index < count) & (column >= 0), other=0.0)


@kernel
@gluon.jit(do_not_specialize=["middle", "sinks", "recent", "mask_batch", "mask_head", "mask_query", "mask_token",
                                "splits", "softcap"])
def attend(query, near, units, shifts, key_words, value_words, key_pages, value_pages, key_room, value_room, key_table, value_table,
           sink_keys, sink_values, tail_keys, tail_values, mask, softcap, scaling, peaks, totals, sums, counts, middle,
           sinks, recent, batch, sink_batch, sink_head, sink_token, tail_batch, tail_head, tail_token, sink_batch_v,
           sink_head_v, sink_token_v, tail_batch_v, tail_head_v, tail_token_v, mask_batch, mask_head, mask_query,
           mask_token, splits, HEADS: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr, DIM: gl.constexpr,
           BLOCK: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr, MASK: gl.constexpr,
           CAPPED: gl.constexpr, CAUSAL: gl.constexpr, COUNTED: gl.constexpr, R: gl.constexpr, N: gl.constexpr,
           N_DENSE: gl.constexpr, S: gl.constexpr):
    """Write peaks, sums of weights and mixtures of every part: `splits` of closed tokens, then those of dense ones.

    KEYS and VALUES are bits of a code, 8 for numbers of 8 bits.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    split = gl.program_id(0)
    part = gl.program_id(1)
    sequence = part // HEADS
    head = part % HEADS
    at = part.to(gl.int64) * gl.num_programs(0) + split
    if COUNTED:  # how many tokens there are is on the device, so that a captured graph serves a growing cache
        middle = gl.load(counts)
        sinks = gl.load(counts + 1)
        recent = gl.load(counts + 2)
    mask += sequence.to(gl.int64) * mask_batch
    sources = (key_words, value_words, key_pages, value_pages, key_room, value_room)
    if split < splits:
        over_codes(split, splits, at, head, sequence, near, units, shifts, sources, key_table, value_table, mask, softcap, peaks, totals, sums, middle,
                   batch, sinks, mask_head, mask_query, mask_token, mma, HEADS, ROWS, QUERIES, DIM, BLOCK, PAGE, KEYS,
                   VALUES, MASK, CAPPED, R, N, S)
    else:
        strides = (sink_batch, sink_head, sink_token, tail_batch, tail_head, tail_token, sink_batch_v, sink_head_v,
                   sink_token_v, tail_batch_v, tail_head_v, tail_token_v)
        over_dense(split - splits, at, head, sequence, query, sink_keys, sink_values, tail_keys, tail_values, mask,
                   softcap, scaling, peaks, totals, sums, middle, sinks, recent, strides, mask_head, mask_query,
                   mask_token, mma, HEADS, ROWS, QUERIES, DIM, DIM, MASK, CAPPED, CAUSAL, R, N_DENSE, S)
