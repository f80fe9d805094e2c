"""A turn's keys, values and scales, asked for by each lane and kept in its registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import bits
from tersor.ops.kv_attention.kernels.ring import shift_of

LOAD = gl.constexpr((None, None, bits.load(2), None, bits.load(4)))
EACH = gl.constexpr(bits.EACH)  # tokens of a lane
registers = gluon.constexpr_function(bits.registers)


@gluon.constexpr_function
def integers(count: int) -> tuple:
    """Return the dtypes of so many words."""
    return (gl.int32,) * count


@gluon.jit
def load(at, COUNT: gl.constexpr):
    """Return COUNT words of each lane as a tuple, two or four."""
    return gl.inline_asm_elementwise(LOAD[COUNT], registers(COUNT, 0, 1), [at], dtype=integers(COUNT), is_pure=True,
                                     pack=1)


@gluon.jit
def place_of(pages, token, batch, sequence, BLOCK: gl.constexpr, PAGE: gl.constexpr):
    """Return how far the slot of a turn's tokens is from the first page, in words."""
    return gl.load(pages + ((token >> shift_of(BLOCK * PAGE)) * batch + sequence)) * 4


@gluon.jit
def line_of(token, head, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr):
    """Return which of a slot's blocks, head by head, has a token."""
    return ((token >> shift_of(BLOCK)) & (PAGE - 1)) * HEADS + head


@gluon.jit
def load_keys(words, far, line, token, quad, WORDS: gl.constexpr, BLOCK: gl.constexpr):
    """Return the words of a lane's tokens: of two tokens in turn, pair by pair.

    They lie pair by pair of a run of 16 tokens, then by run, word and token of a pair: see `shapes.woven`.
    """
    STEPS: gl.constexpr = (WORDS + 3) // 4
    RUNS: gl.constexpr = BLOCK // EACH
    EVEN: gl.constexpr = WORDS % 4 == 0
    found = ()
    run = (token & (BLOCK - 1)) >> 4
    first = words + (far + line * (BLOCK * WORDS) + run * (2 * WORDS))
    for pair in gl.static_range(EACH // 2):
        if EVEN and STEPS % 2 == 0:
            for step in gl.static_range(STEPS // 2):
                found = found + load(first + (pair * (RUNS * 2 * WORDS) + (quad * STEPS + 2 * step) * 2), 4)
        else:
            for step in gl.static_range(STEPS):
                word = gl.minimum(quad * STEPS + step, WORDS - 1)  # those beyond the last meet zeros
                found = found + load(first + (pair * (RUNS * 2 * WORDS) + word * 2), 2)
    return found


@gluon.jit
def load_values(words, far, first, head, lane, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
                LINES: gl.constexpr):
    """Return the words of a lane's 32 tokens of the turn that begins at `first`, four lines of each 32."""
    token = first + (lane & 3) * 32
    half = line_of(token, head, HEADS, BLOCK, PAGE) * (BLOCK // 32) + ((token & (BLOCK - 1)) >> 5)
    at = words + (far + half * LINES + (lane >> 2) * 4)
    found = ()
    for each in gl.static_range(LINES // 32):
        found = found + load(at + each * 32, 4)
    return found


@gluon.jit
def load_scales(words, room, far, row, inside, steps, BYTES: gl.constexpr):
    """Return the scales of a lane's tokens, zeros of none; `steps` are what scales of one byte stand for."""
    found = ()
    some = gl.where(inside, -1, 0)
    if BYTES == 1:
        four = load(words + (far + room + row // 4), 4)
        for each in gl.static_range(EACH):
            step = gl.load(steps + ((four[each // 4] >> (8 * (each % 4))) & 255))
            found = found + ((step.to(gl.int32, bitcast=True) & some).to(gl.float32, bitcast=True),)
    else:
        high = gl.where(inside, -65536, 0)
        first = words + (far + room + row // 2)
        eight = load(first, 4) + load(first + 4, 4)
        for word in gl.static_range(EACH // 2):
            found = found + (((eight[word] << 16) & some).to(gl.float32, bitcast=True),
                             (eight[word] & high).to(gl.float32, bitcast=True))
    return found


@gluon.jit
def load_turn(sources, far, first, inside, head, lane, steps, HEADS: gl.constexpr, BLOCK: gl.constexpr,
              PAGE: gl.constexpr, KEYS: gl.constexpr, KEY_BYTES: gl.constexpr):
    """Return a turn's keys and their scales: of tokens from `first` on, where they are `inside`."""
    token = first + (lane >> 2) * EACH
    line = line_of(token, head, HEADS, BLOCK, PAGE)
    keys = load_keys(sources[0], far, line, token, lane & 3, KEYS // 32, BLOCK)
    return keys, load_scales(sources[0], sources[4], far, line * BLOCK + (token & (BLOCK - 1)), inside, steps,
                             KEY_BYTES)
