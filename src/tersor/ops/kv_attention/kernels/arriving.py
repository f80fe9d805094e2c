"""A turn's keys, values and scales on their way: each warp copies its own to shared memory, and reads them there.

Keys are asked for once those before them have become scores, values once those before them have become sums; each has
the other half of a turn to arrive. PTX addresses shared memory by Triton's name for its beginning. Nothing else is
there until all warps have met at a barrier.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.kv_attention.kernels import bits
from tersor.ops.kv_attention.kernels.ring import shift_of

HELD = gl.constexpr((None, None, bits.held(2), None, bits.held(4)))
COPIED = gl.constexpr(tuple(bits.copied(1, size) for size in (8, 16)))
ENDED, ONE_BEHIND, NONE_BEHIND = (gl.constexpr(bits.waited(behind)) for behind in (-1, 1, 0))
TOGETHER = gl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, 0;")
EACH = gl.constexpr(bits.EACH)  # tokens of a lane
registers = gluon.constexpr_function(bits.registers)


@gluon.constexpr_function
def integers(count: int) -> tuple:
    """Return the dtypes of so many words."""
    return (gl.int32,) * count


@gluon.jit
def held(at, COUNT: gl.constexpr):
    """Return COUNT words of shared memory for each lane, two or four."""
    return gl.inline_asm_elementwise(HELD[COUNT], registers(COUNT, 1), [at], dtype=integers(COUNT), is_pure=False, pack=1)


@gluon.jit
def copy(near, at, SIZE: gl.constexpr):
    """Start to copy SIZE bytes of each lane to shared memory."""
    gl.inline_asm_elementwise(COPIED[SIZE // 16], registers(1, 1, 1), [at, near], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def group(lane, KIND: gl.constexpr):
    """End a group of copies, or wait for some."""
    gl.inline_asm_elementwise(KIND, registers(1, 1), [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def place_of(pages, token, batch, sequence, BLOCK: gl.constexpr, PAGE: gl.constexpr):
    """Return how far the slot of a turn's tokens is from the first page, in words."""
    return gl.load(pages + ((token >> shift_of(BLOCK * PAGE)) * batch + sequence)) * 4


@gluon.jit
def line_of(token, head, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr):
    """Return which of a slot's blocks, head by head, has a token."""
    return ((token >> shift_of(BLOCK)) & (PAGE - 1)) * HEADS + head


@gluon.constexpr_function
def sizes(keys: int, values: int) -> tuple[int, int, int]:
    """Return the bytes of a lane in shared memory: of keys, of values, and of scales of both."""
    return 64 * -(-keys // 128), values // 2, 16


@gluon.constexpr_function
def at_once(words: int) -> int:
    """Return the bytes of a key that a lane copies at a time."""
    return 16 if words % 8 == 0 else 8


@gluon.jit
def copy_keys(near, words, far, line, token, lane, WORDS: gl.constexpr, BLOCK: gl.constexpr):
    """Start to copy the words of a lane's tokens: of two tokens in turn, pair by pair.

    They lie pair by pair of a run of 16 tokens, then by run, word and token of a pair: see `signs.Lying`.
    """
    STEPS: gl.constexpr = (WORDS + 3) // 4
    SIZE: gl.constexpr = at_once(WORDS)
    first = words + (far + line * (BLOCK * WORDS) + ((token & (BLOCK - 1)) >> 4) * (2 * WORDS))
    for pair in gl.static_range(EACH // 2):
        for part in gl.static_range(8 * STEPS // SIZE):
            word = gl.minimum((lane & 3) * STEPS + part * (SIZE // 8), WORDS - 1)  # those beyond the last meet zeros
            copy(near + (pair * (8 * STEPS // SIZE) + part) * (32 * SIZE) + lane * SIZE,
                 first + (pair * (BLOCK // EACH * 2 * WORDS) + word * 2), SIZE)


@gluon.jit
def held_keys(near, lane, WORDS: gl.constexpr):
    """Return what `copy_keys` copied."""
    STEPS: gl.constexpr = (WORDS + 3) // 4
    SIZE: gl.constexpr = at_once(WORDS)
    found = ()
    for part in gl.static_range(EACH // 2 * (8 * STEPS // SIZE)):
        found = found + held(near + part * (32 * SIZE) + lane * SIZE, SIZE // 4)
    return found


@gluon.jit
def scale_at(words, room, far, row, lane, BYTES: gl.constexpr):
    """Return where 16 bytes of the scales of a lane's run lie: those of 16 bits are in two parts."""
    return words + (far + room + (row * BYTES) // 4 + (lane & 1) * (4 * (BYTES - 1)))


@gluon.jit
def copy_values(near, words, far, line, lane, LINES: gl.constexpr):
    """Start to copy the words of a lane's 32 tokens, four lines of each 32; `line` is that of their block."""
    first = words + (far + line * LINES + (lane >> 2) * 4)
    for each in gl.static_range(LINES // 32):
        copy(near + (each * 32 + lane) * 16, first + each * 32, 16)


@gluon.jit
def held_scales(near, lane, inside, steps, RANK: gl.constexpr, BYTES: gl.constexpr):
    """Return the scales of a lane's tokens, zeros of none; `steps` are what scales of one byte stand for."""
    found = ()
    some = gl.where(inside, -1, 0)
    first = near + ((lane >> 2) * 4 + RANK) * 16
    if BYTES == 1:
        four = held(first, 4)
        for each in gl.static_range(EACH):
            step = gl.load(steps + ((four[each // 4] >> (8 * (each % 4))) & 255))
            found = found + ((step.to(gl.int32, bitcast=True) & some).to(gl.float32, bitcast=True),)
    else:
        high = gl.where(inside, -65536, 0)
        eight = held(first, 4) + held(first + 16, 4)
        for word in gl.static_range(EACH // 2):
            found = found + (((eight[word] << 16) & some).to(gl.float32, bitcast=True),
                             (eight[word] & high).to(gl.float32, bitcast=True))
    return found


@gluon.constexpr_function
def room_of(keys: int, values: int) -> int:
    """Return the bytes of a warp in shared memory."""
    return 32 * sum(sizes(keys, values))


@gluon.jit
def memory(thread, KEYS: gl.constexpr, VALUES: gl.constexpr, S: gl.constexpr):
    """Return where shared memory begins, after making sure that there is enough for all warps."""
    WORDS: gl.constexpr = S * room_of(KEYS, VALUES) // 4
    room = gl.allocate_shared_memory(gl.int32, [WORDS // (32 * S), 32 * S], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    room.index(0).store(thread)
    gl.thread_barrier()
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", registers(1, 1), [thread], dtype=gl.int32, is_pure=True,
                                     pack=1)


@gluon.jit
def ask_keys(near, sources, far, first, head, lane, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
             KEYS: gl.constexpr, KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr):
    """Start to copy the keys of a turn that begins at `first`, and the scales of keys and values."""
    token = first + (lane >> 2) * EACH
    line = line_of(token, head, HEADS, BLOCK, PAGE)
    copy_keys(near[0], sources[0], far[0], line, token, lane, KEYS // 32, BLOCK)
    row = line * BLOCK + (token & (BLOCK - 1))
    copy(near[1] + lane * 16, gl.where((lane & 2) == 0, scale_at(sources[0], sources[4], far[0], row, lane, KEY_BYTES),
                                       scale_at(sources[1], sources[5], far[1], row, lane, VALUE_BYTES)), 16)
    group(lane, ENDED)


@gluon.jit
def ask_values(near, words, far, first, head, lane, HEADS: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr,
               VALUES: gl.constexpr):
    """Start to copy the values of a turn that begins at `first`: 32 tokens of a lane."""
    token = first + (lane & 3) * 32
    line = line_of(token, head, HEADS, BLOCK, PAGE) * (BLOCK // 32) + ((token & (BLOCK - 1)) >> 5)
    copy_values(near, words, far, line, lane, VALUES)
    group(lane, ENDED)
