"""Tokens to bytes that name words: a program takes some tokens of one head and a byte of each."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel

MOST = tl.constexpr(16)  # numbers of a word
NAMES = tl.constexpr(256)


@kernel
@triton.jit
def name(states, centre, analysis, words, weights, places, codes, flag, batch, batch_step, head_step, token_step,
         HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr,
         BYTES: tl.constexpr, ROWS: tl.constexpr):
    """Write a byte of ROWS tokens of a head, (blocks, batch, heads, tokens of a block, BYTES), and raise the flag.

    `places` has of each byte where its numbers begin and how many they are. WIDE is a power of two that holds DIM.
    """
    TURNS: tl.constexpr = BLOCK // ROWS
    line = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1)
    head = (line // TURNS) % HEADS
    sequence = (line // (TURNS * HEADS)) % batch
    block = line // (TURNS * HEADS * batch)
    row = tl.arange(0, ROWS)
    place = tl.arange(0, WIDE)
    there = place < DIM
    token = block * BLOCK + line % TURNS * ROWS + row
    at = states + sequence * batch_step + head * head_step + token[:, None] * token_step + place[None, :]
    x = tl.load(at, (token >= 0)[:, None] & there[None, :], other=0.0).to(tl.float32)
    if byte == 0:
        sound = tl.sum((tl.abs(x) <= 3.4028234663852886e38).to(tl.int32), 1) == WIDE  # neither NaN nor infinity
        if tl.min(sound.to(tl.int32), 0) == 0:
            tl.store(flag, 1)
    x -= tl.load(centre + head * DIM + place, there, other=0.0)[None, :]
    first = tl.load(places + 2 * byte)
    number = tl.arange(0, MOST)
    inside = number < tl.load(places + 2 * byte + 1)
    turn = tl.load(analysis + (head * DIM + place[:, None]) * COUNT + first + number[None, :],
                   there[:, None] & inside[None, :], other=0.0)
    near = tl.dot(x, turn, input_precision="tf32x3")
    size = tl.load(weights + head * COUNT + first + number, inside, other=0.0)
    word = tl.arange(0, NAMES)
    book = tl.load(words + word[None, :] * COUNT + first + number[:, None], inside[:, None] & (word >= 0)[None, :],
                   other=0.0) * size[:, None]
    far = tl.sum(book * book, 0)[None, :] - 2.0 * tl.dot(near, book, input_precision="tf32x3")
    tl.store(codes + (line * ROWS + row) * BYTES + byte, tl.argmin(far, 1).to(tl.uint8))
