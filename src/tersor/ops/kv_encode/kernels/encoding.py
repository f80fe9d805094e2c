"""Tokens to codes and scales: a program takes some tokens of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel

PEAK = tl.constexpr(448.0)  # of e4m3
LARGEST = tl.constexpr(3.3895313892515355e38)  # of bfloat16


@triton.jit
def chosen(numbers, table, LEVELS: tl.constexpr):
    """Return the nearest of ascending levels, and its place."""
    low = tl.load(table)
    code = tl.zeros(numbers.shape, tl.int32)
    level = tl.zeros(numbers.shape, tl.float32) + low
    for k in tl.static_range(1, LEVELS):
        high = tl.load(table + k)
        above = numbers > (low + high) * 0.5
        code = tl.where(above, k, code)
        level = tl.where(above, high, level)
        low = high
    return level, code


@triton.jit
def packed(code, BITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Return codes as little-endian groups: of bytes, or, of 3 bits, of three bytes."""
    COUNT: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    place = tl.arange(0, COUNT)[None, None, :] * BITS
    return tl.sum(tl.reshape(code, [ROWS, DIM // COUNT, COUNT]) << place, 2)


@kernel
@triton.jit
def encode(states, maps, table, codes, scales, flag, batch, batch_step, head_step, token_step, HEADS: tl.constexpr,
           BLOCK: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, REFITS: tl.constexpr, MAPPED: tl.constexpr,
           ROWS: tl.constexpr):
    """Write codes and scales of ROWS tokens of a head: (blocks, batch, heads, tokens of a block)."""
    TURNS: tl.constexpr = BLOCK // ROWS
    line = tl.program_id(0).to(tl.int64)
    head = (line // TURNS) % HEADS
    sequence = (line // (TURNS * HEADS)) % batch
    block = line // (TURNS * HEADS * batch)
    row = tl.arange(0, ROWS)
    place = tl.arange(0, DIM)
    token = block * BLOCK + line % TURNS * ROWS + row
    at = states + sequence * batch_step + head * head_step + token[:, None] * token_step + place[None, :]
    x = tl.load(at).to(tl.float32)
    if MAPPED:
        turn = tl.load(maps + place[:, None] * DIM + place[None, :])
        x = tl.dot(x, tl.trans(turn), input_precision="tf32x3")
    size = tl.abs(x)
    peak = tl.max(size, 1)
    sound = tl.sum((size <= 3.4028234663852886e38).to(tl.int32), 1) == DIM  # neither NaN nor infinity
    if BITS == 8:
        scale = (peak / PEAK).to(tl.bfloat16)
    else:
        safe = tl.where(peak > 0.0, peak, 1.0)
        unit = x / safe[:, None]
        spread = tl.sqrt(tl.sum(unit * unit, 1) / DIM) * safe
        unit = x * tl.where(spread > 0.0, 1.0 / spread, 0.0)[:, None]
        factor = tl.full([ROWS], 1.0, tl.float32)
        for _ in tl.static_range(REFITS):
            level, _code = chosen(unit * tl.where(factor > 0.0, 1.0 / factor, 0.0)[:, None], table, 1 << BITS)
            power = tl.sum(level * level, 1)
            refit = tl.sum(level * unit, 1) / tl.where(power > 0.0, power, 1.0)
            factor = tl.where((power > 0.0) & (refit > 0.0), refit, factor)
        scale = tl.minimum(spread * factor, LARGEST).to(tl.bfloat16)
    near = scale.to(tl.float32)
    unit = x * tl.where(near > 0.0, 1.0 / near, 0.0)[:, None]
    first = line * ROWS + row
    if BITS == 8:
        number = tl.minimum(tl.maximum(unit, -PEAK), PEAK).to(tl.float8e4nv)
        tl.store(codes + first[:, None] * DIM + place[None, :], number.to(tl.uint8, bitcast=True))
    else:
        _level, code = chosen(unit, table, 1 << BITS)
        group = packed(code, BITS, ROWS, DIM)
        if BITS == 3:
            spot = codes + first[:, None] * (DIM * 3 // 8) + 3 * tl.arange(0, DIM // 8)[None, :]
            for k in tl.static_range(3):
                tl.store(spot + k, ((group >> (8 * k)) & 255).to(tl.uint8))
        else:
            tl.store(codes + first[:, None] * (DIM * BITS // 8) + tl.arange(0, DIM * BITS // 8)[None, :],
                     group.to(tl.uint8))
    tl.store(scales + first, tl.where(sound, near, float("nan")).to(tl.bfloat16))
    if tl.min(sound.to(tl.int32), 0) == 0:
        tl.store(flag, 1)
