"""Products with matrices of codewords on CUDA: tables of products; or codewords looked up, swaps undone in registers.

A tile is BR rows by MG groups of DIM numbers of each of the C = 2^LAYERS blocks that swaps make of a row: C tensors
[BR, MG, DIM], which hold DIM MG runs of C numbers that lay side by side before the swaps. See README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.ops.product_linear.payload import Payload
from tersor.ops.product_linear.shapes import BATCH, BLOCK, EXACT, LOOK_UP_BATCH, MOST_BOOK, plan_of, radix
from tersor.ops.workspace import multiprocessors, workspace


@triton.jit
def _bits(words, place, last, WIDTH: tl.constexpr, inside):
    # numbers of WIDTH bits at `place` of a little-endian stream whose last element is `last`: bytes, or 16 bits each
    if WIDTH == 8:
        return tl.load(words + place, inside, other=0).to(tl.int32)
    elif WIDTH == 16:
        return tl.load(words + place, inside, other=0).to(tl.int32) & 0xFFFF
    else:
        bit = place.to(tl.int64) * WIDTH
        first = bit >> 3
        found = tl.load(words + first, inside, other=0).to(tl.int32)
        if 8 % WIDTH != 0:
            found |= tl.load(words + first + 1, inside & (first + 1 <= last), other=0).to(tl.int32) << 8
        if WIDTH > 10 or WIDTH == 9:
            found |= tl.load(words + first + 2, inside & (first + 2 <= last), other=0).to(tl.int32) << 16
        return (found >> (bit & 7).to(tl.int32)) & ((1 << WIDTH) - 1)


@triton.jit
def _digits(words, out, count, last, LEVELS: tl.constexpr, DIGITS: tl.constexpr, BYTES: tl.constexpr,
            BLOCK: tl.constexpr):
    # the digits of words of BYTES bytes, one after the other; quotients are estimated in float64, what is left is
    # divided again, which comes within 1, and that is corrected
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = tl.zeros([BLOCK], tl.int64)
    for k in tl.static_range(BYTES):
        at = word * BYTES + k
        number |= tl.load(words + at, at <= last, other=0).to(tl.int64) << (8 * k)
    for digit in tl.static_range(DIGITS):
        rest = (number.to(tl.float64) * (1.0 / LEVELS)).to(tl.int64)
        code = (number - rest * LEVELS).to(tl.int32)
        more = (code.to(tl.float64) * (1.0 / LEVELS)).to(tl.int32)
        code -= more * LEVELS
        carry = (code >= LEVELS).to(tl.int32) - (code < 0).to(tl.int32)
        code -= carry * LEVELS
        number = rest + (more + carry).to(tl.int64)
        place = word * DIGITS + digit
        tl.store(out + place, code.to(out.dtype.element_ty), place < count)


@triton.jit
def _affine(scale, offset, middle, SCALED: tl.constexpr, SHIFTED: tl.constexpr):
    # a codebook's number stands for number * factor + shift, where numbers are less by `middle` than those stored
    factor = 1.0
    if SCALED:
        factor = tl.load(scale)
    shift = 0.0
    if SHIFTED:
        shift = tl.load(offset) + middle * factor
    return factor, shift


@triton.jit
def _unpack(books, out, count, last, WIDTH: tl.constexpr, MIDDLE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    number = _bits(books, place, last, WIDTH, inside)
    tl.store(out + place, (number - MIDDLE).to(tl.float32).to(out.dtype.element_ty), inside)


@triton.jit
def _products(x, books, scale, offset, tables, groups, last, WORDS: tl.constexpr, DIM: tl.constexpr,
              SHARED: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
              SHIFTED: tl.constexpr, BW: tl.constexpr):
    # tables[b, g, w] = x[b, g] · book[g, w]
    group = tl.program_id(0)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    d = tl.arange(0, DIM)
    factor, shift = _affine(scale, offset, 0.0, SCALED, SHIFTED)
    book = 0 if SHARED else group.to(tl.int64) * WORDS
    place = (book + word)[:, None] * DIM + d[None, :]
    inside = (word < WORDS)[:, None]
    if WIDTH > 0:
        number = _bits(books, place, last, WIDTH, inside & (d >= 0)[None, :]).to(tl.float32)
    else:
        number = tl.load(books + place, inside, other=0.0).to(tl.float32)
    value = number * factor + shift
    for b in tl.static_range(BATCH):
        row = (b * groups + group).to(tl.int64)
        part = tl.load(x + row * DIM + d).to(tl.float32)
        tl.store(tables + row * WORDS + word, tl.sum(value * part[None, :], 1), word < WORDS)


@triton.jit
def _look_up(codes, tables, partial, rows, groups, last, chunk, WORDS: tl.constexpr,
             BITS: tl.constexpr, BATCH: tl.constexpr, BR: tl.constexpr,
             MG: tl.constexpr):
    # partial[split, b, r]: products of a split of groups, summed; a program takes `chunk` tiles of rows
    split = tl.program_id(0)
    group = split * MG + tl.arange(0, MG)
    start = tl.program_id(1) * chunk
    r = tl.arange(0, BR)
    known = (group < groups)[None, :]
    place = (start * BR + r).to(tl.int64)[:, None] * groups + group[None, :]
    code = _bits(codes, place, last, BITS, known & (start * BR + r < rows)[:, None])
    for step in range(start, start + chunk):
        row = step * BR + r
        inside = known & (row < rows)[:, None]
        after = (row + BR).to(tl.int64)
        ahead = _bits(codes, after[:, None] * groups + group[None, :], last, BITS, known & (after < rows)[:, None])
        for b in tl.static_range(BATCH):
            book = (b * groups + group).to(tl.int64)[None, :] * WORDS
            found = tl.load(tables + book + code, inside, other=0.0)
            out = (split * BATCH + b).to(tl.int64) * rows + row
            tl.store(partial + out, tl.sum(found, 1), row < rows)
        code = ahead


@triton.jit
def _weights(codes, books, mask, factor, shift, row, group, inside, groups, last, WORDS: tl.constexpr,
             DIM: tl.constexpr, SHARED: tl.constexpr, LAYERS: tl.constexpr, BITS: tl.constexpr):
    # 2^LAYERS tensors [BR, MG, DIM]: number t holds the weights of inputs 2^LAYERS m + t, m = group DIM + d
    d = tl.arange(0, DIM)[None, None, :]
    held = inside[:, :, None] & (d >= 0)
    each = groups >> LAYERS
    m = group.to(tl.int64)[None, :, None] * DIM + d
    found = ()
    for c in tl.static_range(1 << LAYERS):
        place = row[:, None] * groups + (c * each + group)[None, :]
        code = _bits(codes, place, last, BITS, inside)
        if not SHARED:
            code += (c * each + group)[None, :] * WORDS
        number = tl.load(books + code.to(tl.int64)[:, :, None] * DIM + d, held, other=0.0)
        found = found + (number.to(tl.float32) * factor + shift,)  # noqa: RUF005 - Triton knows no starred tuples
    for undone in tl.static_range(LAYERS):
        made = ()
        for block in tl.static_range(1 << (LAYERS - 1 - undone)):
            # of layer LAYERS - 1 - undone; pairs of a block that were side by side: 2^undone for each m
            bit = (row[:, None, None] * LAYERS + (LAYERS - 1 - undone)) * (groups * DIM // 2)
            bit += block * ((groups * DIM) >> (LAYERS - undone))
            bit += m << undone
            swaps = tl.load(mask + (bit >> 3), held, other=0).to(tl.int32) >> (bit & 7).to(tl.int32)
            for t in tl.static_range(1 << undone):
                small = found[((2 * block) << undone) + t]
                large = found[((2 * block + 1) << undone) + t]
                less = ((swaps >> t) & 1) == 1
                made = made + (tl.where(less, small, large), tl.where(less, large, small))  # noqa: RUF005
        found = made
    return found


@triton.jit
def _multiply(x, codes, books, mask, scale, offset, partial, rows, groups, last, chunk,
              middle: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, LAYERS: tl.constexpr,
              BITS: tl.constexpr, SCALED: tl.constexpr,
              SHIFTED: tl.constexpr, BATCH: tl.constexpr, BR: tl.constexpr, MG: tl.constexpr):
    # partial[split, b, r]: x times the weights of a split; a program takes `chunk` tiles of rows
    split = tl.program_id(0)
    group = split * MG + tl.arange(0, MG)
    start = tl.program_id(1) * chunk
    known = (group < (groups >> LAYERS))[None, :]
    m = group.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    here = (group < (groups >> LAYERS))[:, None] & (m >= 0)
    factor, shift = _affine(scale, offset, middle, SCALED, SHIFTED)
    for step in range(start, start + chunk):
        row = step * BR + tl.arange(0, BR)
        inside = known & (row < rows)[:, None]
        found = _weights(codes, books, mask, factor, shift, row.to(tl.int64), group, inside, groups,
                         last, WORDS, DIM, SHARED, LAYERS, BITS)
        for b in tl.static_range(BATCH):
            at = (m << LAYERS) + b * groups * DIM
            total = tl.zeros([BR, MG, DIM], tl.float32)
            for t in tl.static_range(1 << LAYERS):
                total += found[t] * tl.load(x + at + t, here, other=0.0).to(tl.float32)[None, :, :]
            out = (split * BATCH + b).to(tl.int64) * rows + row
            tl.store(partial + out, tl.sum(tl.sum(total, 2), 1), row < rows)


@triton.jit
def _decode(codes, books, mask, scale, offset, out, first, rows, groups, last,
            middle: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, LAYERS: tl.constexpr,
            BITS: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
            BR: tl.constexpr, MG: tl.constexpr):
    # out[r, :]: rows `first` to `rows` of the matrix
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    group = tl.program_id(1) * MG + tl.arange(0, MG)
    row = first + r
    inside = (group < (groups >> LAYERS))[None, :] & (row < rows)[:, None]
    m = group[:, None] * DIM + tl.arange(0, DIM)[None, :]
    factor, shift = _affine(scale, offset, middle, SCALED, SHIFTED)
    found = _weights(codes, books, mask, factor, shift, row.to(tl.int64), group, inside, groups, last,
                     WORDS, DIM, SHARED, LAYERS, BITS)
    place = r.to(tl.int64)[:, None, None] * (groups * DIM) + (m << LAYERS)[None, :, :]
    held = inside[:, :, None] & (m >= 0)[None, :, :]
    for t in tl.static_range(1 << LAYERS):
        tl.store(out + place + t, found[t].to(out.dtype.element_ty), held)


@triton.jit
def _total(partial, out, count, splits, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    at = place
    for _ in range(splits):
        total += tl.load(partial + at, place < count, other=0.0)
        at += count
    tl.store(out + place, total.to(out.dtype.element_ty), place < count)


def multiply(x: Tensor, payload: Payload) -> Tensor:
    """Return `x Wᵀ` in the dtype of `x`."""
    width, device = x.shape[-1], x.device
    flat = x.reshape(-1, width).contiguous()
    with torch.cuda.device(device):
        if not flat.numel():
            out = torch.empty(flat.shape[0], payload.rows, dtype=x.dtype, device=device)
        elif flat.shape[0] > BATCH:
            out = _by_blocks(flat, payload)
        else:
            out = _few(flat, payload)
    return out.reshape(*x.shape[:-1], payload.rows)


def looks_up(batch: int, groups: int, payload: Payload) -> bool:
    """Tell whether products of all codewords are made first: where that is less than one of each row."""
    return (not payload.layers and batch <= LOOK_UP_BATCH and payload.words <= payload.rows
            and batch * groups * payload.words < MOST_BOOK)


def _few(x: Tensor, payload: Payload) -> Tensor:
    batch, groups = x.shape[0], x.shape[1] // payload.dim
    look_up = looks_up(batch, groups, payload)
    plan = plan_of(payload.rows, groups, payload.layers, look_up=look_up, dim=payload.dim,
                   processors=multiprocessors(x.device))
    partial = workspace((plan.splits, batch, payload.rows), torch.float32, x.device, "partial sums")
    grid, (codes, width) = (plan.splits, plan.programs), _codes(payload, groups)
    last = codes.numel() - 1
    if look_up:
        tables = _products_of(x, payload)
        _look_up[grid](codes, tables, partial, payload.rows, groups, last, plan.chunk, payload.words, width, batch,
                       plan.rows, plan.groups, num_warps=plan.warps)
    else:
        books, middle = _books(payload)
        _multiply[grid](x, codes, books, payload.mask, payload.scale, payload.offset, partial, payload.rows,
                        groups, last, plan.chunk, middle, payload.words, payload.dim, payload.books == 1,
                        payload.layers, width, payload.scale is not None, payload.offset is not None, batch,
                        plan.rows, plan.groups, num_warps=plan.warps)
    out = torch.empty(batch, payload.rows, dtype=x.dtype, device=x.device)
    _total[(triton.cdiv(out.numel(), 256),)](partial, out, out.numel(), plan.splits, 256, num_warps=4)
    return out


def _by_blocks(x: Tensor, payload: Payload) -> Tensor:
    """Decode blocks of rows, bfloat16 for bfloat16 vectors, else float32, and multiply each."""
    width = x.shape[1]
    groups = width // payload.dim
    kind = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    step = min(payload.rows, max(1, BLOCK // width))
    block = workspace((step, width), kind, x.device, "decoded rows")
    given = x.to(kind)
    out = torch.empty(x.shape[0], payload.rows, dtype=x.dtype, device=x.device)
    codes, packed = _codes(payload, groups)
    books, middle = _books(payload)
    each = groups >> payload.layers
    tile, wide = 16, min(max(8, 32 >> payload.layers), triton.next_power_of_2(each))
    for first in range(0, payload.rows, step):
        stop = min(first + step, payload.rows)
        _decode[(triton.cdiv(stop - first, tile), triton.cdiv(each, wide))](
            codes, books, payload.mask, payload.scale, payload.offset, block, first, stop, groups, codes.numel() - 1,
            middle, payload.words, payload.dim, payload.books == 1, payload.layers, packed, payload.scale is not None,
            payload.offset is not None, tile, wide, num_warps=4)
        out[:, first:stop] = given @ block[: stop - first].T
    return out


def _codes(payload: Payload, groups: int) -> tuple[Tensor, int]:
    """Return codes of a power of two as they are, others unpacked to 8 or 16 bits each; and the bits of one."""
    width, digits, nbytes = radix(payload.words)
    if width:
        return _stream(payload.codes, width), width
    kind = torch.uint8 if payload.words <= 256 else torch.int16
    codes = workspace((payload.rows * groups,), kind, payload.codes.device, "unpacked codes")
    grid = (triton.cdiv(triton.cdiv(codes.numel(), digits), 128),)
    _digits[grid](payload.codes, codes, codes.numel(), payload.codes.numel() - 1, payload.words, digits, nbytes, 128,
                  num_warps=4)
    return codes, 8 * kind.itemsize


def _stream(packed: Tensor, width: int) -> Tensor:
    """Return packed numbers of `width` bits as the kernels read them: bytes, or elements of 16 bits."""
    return packed.view(torch.int16) if width == 16 else packed


def _width(payload: Payload) -> int:
    """Return the bits of a codebook's integers, or 0."""
    return payload.levels.bit_length() - 1 if payload.levels else 0


def _products_of(x: Tensor, payload: Payload) -> Tensor:
    """Return products of vectors and codewords, float32 (batch, groups, words)."""
    batch, groups = x.shape[0], x.shape[1] // payload.dim
    tables = workspace((batch, groups, payload.words), torch.float32, x.device, "products of vectors and codewords")
    wide = min(256, triton.next_power_of_2(payload.words))
    books = _stream(payload.codebooks, _width(payload))
    _products[(groups, triton.cdiv(payload.words, wide))](
        x, books, payload.scale, payload.offset, tables, groups, books.numel() - 1,
        payload.words, payload.dim, payload.books == 1, batch, _width(payload), payload.scale is not None,
        payload.offset is not None, wide, num_warps=4)
    return tables


def _books(payload: Payload) -> tuple[Tensor, int]:
    """Return codebooks as floats, and what has been taken off their integers: half their range, which float16 holds."""
    width = _width(payload)
    if not width:
        return payload.codebooks, 0
    count, middle = payload.books * payload.words * payload.dim, payload.levels // 2
    kind = torch.float16 if width <= EXACT else torch.float32
    books = workspace((count,), kind, payload.codes.device, "unpacked codebooks")
    packed = _stream(payload.codebooks, width)
    _unpack[(triton.cdiv(count, 1024),)](packed, books, count, packed.numel() - 1, width, middle, 1024, num_warps=4)
    return books, middle
