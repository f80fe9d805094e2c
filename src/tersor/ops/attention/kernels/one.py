"""Attention of one token in one kernel: a program for each of its heads. Longer caches have `parts`.

Such a kernel waits for memory: so a block's keys and values are all asked for before the block's scores are complete.
Of places that the mask hides nothing is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@kernel
@triton.jit
def attend(query, key, value, mask, out, factor, QUERY_LINE: tl.constexpr, QUERY: tl.constexpr,
           KEY_LINE: tl.constexpr, KEY: tl.constexpr, KEY_PLACE: tl.constexpr, VALUE_LINE: tl.constexpr,
           VALUE: tl.constexpr, VALUE_PLACE: tl.constexpr, SEEN_LINE: tl.constexpr, SEEN: tl.constexpr,
           PLACES: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    # HEADS heads share keys and values, a group; `factor` is the scale, to the base 2. Strides (of a sequence, a head
    # or group, a place) are constants: then loads of a thread have one address, and offsets.
    tl.extra.cuda.gdc_launch_dependents()  # what follows may ask for its codes meanwhile
    head = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    group = (head // HEADS).to(tl.int64)
    column = tl.arange(0, SIZE)
    key += line * KEY_LINE + group * KEY
    value += line * VALUE_LINE + group * VALUE
    mask += line * SEEN_LINE
    tl.extra.cuda.gdc_wait()  # the kernel before may still write what is attended to
    wanted = tl.load(query + line * QUERY_LINE + head * QUERY + column).to(tl.float32) * factor
    peak = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    found = tl.zeros([SIZE], tl.float32)
    for start in range(0, PLACES, BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen = tl.load(mask + place * SEEN, place < PLACES, other=0) != 0
        keys = tl.load(key + (place[:, None] * KEY_PLACE + column[None, :]), seen[:, None])  # anything elsewhere
        values = tl.load(value + (place[:, None] * VALUE_PLACE + column[None, :]), seen[:, None], other=0.0)
        scores = tl.where(seen, tl.sum(keys.to(tl.float32) * wanted[None, :], 1), -float("inf"))
        most = tl.maximum(peak, tl.max(scores, 0))
        base = tl.where(most == -float("inf"), 0.0, most)  # where all of the first blocks is hidden
        weights, before = tl.exp2(scores - base), tl.exp2(peak - base)
        total = total * before + tl.sum(weights, 0)
        found = found * before + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        peak = most
    tl.store(out + (line * (GROUPS * HEADS) + head) * SIZE + column, (found / total).to(out.dtype.element_ty))
