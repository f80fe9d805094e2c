"""Closed tokens on their way: chunks of codes and scales are copied to a ring in shared memory ahead of their use.

Each warp copies and reads its own turn of N tokens. Codes of 3 bits are no powers of two, and do not come here.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tersor.ops.kv_attention.kernels.decoding import codes_of


@gluon.constexpr_function
def shift_of(count: int) -> int:
    """Return the logarithm of a power of two."""
    return count.bit_length() - 1


@gluon.jit
def lines_of(words, pages, chunk, batch, sequence, SIDE: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
             PAGE: gl.constexpr, DIM: gl.constexpr, TURNS: gl.constexpr):
    """Return where the codes and the scales of a chunk's first block begin, as words: chunks end within pages.

    A sequence's slot of a page is given by how far it is from the first page, in 16 bytes; it holds the codes of its
    blocks, then scales.
    """
    token = chunk * TURNS
    far = gl.load(pages + ((token >> shift_of(BLOCK * PAGE)) * batch + sequence)).to(gl.int64) * 4
    line = ((token >> shift_of(BLOCK)) & (PAGE - 1)).to(gl.int64) * HEADS
    return words + (far + line * (BLOCK * DIM * SIDE // 32)), words + (far + line * (BLOCK // 2))


@gluon.jit
def row_of(first, head, HEADS: gl.constexpr, BLOCK: gl.constexpr):
    """Return the rows of a slot at which tokens `first` of a chunk lie, from the chunk's first block on."""
    return ((first >> shift_of(BLOCK)) * HEADS + head) * BLOCK + (first & (BLOCK - 1))


@gluon.jit
def make_rings(KEYS: gl.constexpr, VALUES: gl.constexpr, DIM: gl.constexpr, S: gl.constexpr, N: gl.constexpr,
               STAGES: gl.constexpr):
    """Return rings of codes and scales of keys, then of values."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return (gl.allocate_shared_memory(gl.int32, [STAGES, S, N * DIM * KEYS // 32], plain),
            gl.allocate_shared_memory(gl.int32, [STAGES, S, N // 2], plain),
            gl.allocate_shared_memory(gl.int32, [STAGES, S, N * DIM * VALUES // 32], plain),
            gl.allocate_shared_memory(gl.int32, [STAGES, S, N // 2], plain))


@gluon.jit
def copy_words(place, base, rows, wanted, ROW: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """Start to copy COUNT words of each warp from its row on, a row of ROW words or, for 0, of half a word."""
    index = gl.arange(0, COUNT, layout=gl.SliceLayout(0, layout))[None, :]
    at = base + ((rows * ROW if ROW else rows >> 1) + index)
    async_copy.async_copy_global_to_shared(place, at, mask=wanted & (rows >= 0) & (index >= 0))


@gluon.jit
def rows_of_turns(chunk, middle, head, HEADS: gl.constexpr, BLOCK: gl.constexpr, layout: gl.constexpr,
                  S: gl.constexpr, N: gl.constexpr):
    """Return `row_of` each warp's turn; of the chunk's first where a turn lies beyond the last token."""
    first = gl.arange(0, S, layout=gl.SliceLayout(1, layout))[:, None] * N
    return row_of(gl.where(chunk * (S * N) + first < middle, first, 0), head, HEADS, BLOCK)


@gluon.jit
def ask(rings, stage, chunk, wanted, middle, sources, batch, sequence, head, HEADS: gl.constexpr, BLOCK: gl.constexpr,
        PAGE: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr, DIM: gl.constexpr, S: gl.constexpr, N: gl.constexpr):
    """Start to copy a chunk where it is wanted; a warp beyond the last token copies the chunk's first turn."""
    key_words, value_words, key_pages, value_pages, key_room, value_room = sources
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [S, 1], [1, 0])
    thin: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [S, 1], [1, 0])
    rows = rows_of_turns(chunk, middle, head, HEADS, BLOCK, flat, S, N)
    lines = rows_of_turns(chunk, middle, head, HEADS, BLOCK, thin, S, N)
    codes, scales = lines_of(key_words, key_pages, gl.where(wanted, chunk, 0), batch, sequence, KEYS, HEADS, BLOCK, PAGE,
                             DIM, S * N)
    copy_words(rings[0].index(stage), codes, rows, wanted, DIM * KEYS // 32, N * DIM * KEYS // 32, flat)
    copy_words(rings[1].index(stage), scales + key_room, lines, wanted, 0, N // 2, thin)
    codes, scales = lines_of(value_words, value_pages, gl.where(wanted, chunk, 0), batch, sequence, VALUES, HEADS, BLOCK, PAGE,
                             DIM, S * N)
    copy_words(rings[2].index(stage), codes, rows, wanted, DIM * VALUES // 32, N * DIM * VALUES // 32, flat)
    copy_words(rings[3].index(stage), scales + value_room, lines, wanted, 0, N // 2, thin)
    async_copy.commit_group()


@gluon.jit
def take_scales(ring, stage, mma: gl.constexpr, S: gl.constexpr, N: gl.constexpr):
    """Return the scales of a stage, (S, N, 1)."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    found = ring.index(stage)._reinterpret(gl.bfloat16, [S, N], flat).load(gl.SliceLayout(2, mma))
    return found.to(gl.float32)[:, :, None]


@gluon.jit
def take(rings, stage, KEYS: gl.constexpr, VALUES: gl.constexpr, DIM: gl.constexpr, lk: gl.constexpr, lv: gl.constexpr,
         mma: gl.constexpr, S: gl.constexpr, N: gl.constexpr):
    """Return elements and scales of the keys and the values of a stage."""
    COUNT_K: gl.constexpr = DIM // codes_of(KEYS, DIM)
    COUNT_V: gl.constexpr = DIM // codes_of(VALUES, DIM)
    deep: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    kind_k: gl.constexpr = gl.int16 if N * COUNT_K * 16 == N * DIM * KEYS else gl.int32
    kind_v: gl.constexpr = gl.int16 if N * COUNT_V * 16 == N * DIM * VALUES else gl.int32
    keys = rings[0].index(stage)._reinterpret(kind_k, [S, N, COUNT_K], deep).load(lk)
    values = rings[2].index(stage)._reinterpret(kind_v, [S, N, COUNT_V], deep).permute((0, 2, 1)).load(lv)
    return keys, take_scales(rings[1], stage, mma, S, N), values, take_scales(rings[3], stage, mma, S, N)
