"""Bits of blocks from the order in which they are stored to that in which they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel


@kernel
@triton.jit
def place_bits(codes, places, table, out, nbytes, MAPPED: tl.constexpr, WORDS: tl.constexpr):
    """Write WORDS words of a block's `nbytes`: bit k of them is bit `places[k]` of the block, through `table` if MAPPED.

    `table` says what a byte becomes before its bits are taken.
    """
    block = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    there = word < nbytes // 4
    bit = tl.arange(0, 32)
    at = tl.load(places + word[:, None] * 32 + bit[None, :], there[:, None], other=0)
    byte = tl.load(codes + block * nbytes + (at >> 3)).to(tl.int32)
    if MAPPED:
        byte = tl.load(table + byte).to(tl.int32)
    found = tl.sum(((byte >> (at & 7)) & 1) << bit[None, :], 1)
    tl.store(out + block * (nbytes // 4) + word, found, there)
