"""Products with matrices of codewords: which kernels run, on what. See README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.product_linear.codewords import Codewords
from tersor.ops.product_linear.kernels.decoded import decode_words
from tersor.ops.product_linear.kernels.few import add_products, add_splits, make_products, multiply_words
from tersor.ops.product_linear.kernels.packed import unpack_bits, unpack_digits
from tersor.ops.product_linear.shapes import BATCH, BLOCK, EXACT, LOOK_UP_BATCH, MOST_BOOK, division_of, radix
from tersor.ops.workspace import multiprocessors, workspace


def multiply(x: Tensor, matrix: Codewords) -> Tensor:
    """Return `x Wᵀ` in the dtype of `x`."""
    width, device = x.shape[-1], x.device
    flat = x.reshape(-1, width).contiguous()
    with torch.cuda.device(device):
        if not flat.numel():
            out = torch.empty(flat.shape[0], matrix.rows, dtype=x.dtype, device=device)
        elif flat.shape[0] > BATCH:
            out = _by_blocks(flat, matrix)
        else:
            out = _few(flat, matrix)
    return out.reshape(*x.shape[:-1], matrix.rows)


def looks_up(batch: int, groups: int, matrix: Codewords) -> bool:
    """Tell whether products of all codewords are made first: where that is less than one of each row."""
    return (not matrix.layers and batch <= LOOK_UP_BATCH and matrix.words <= matrix.rows
            and batch * groups * matrix.words < MOST_BOOK)


def _few(x: Tensor, matrix: Codewords) -> Tensor:
    batch, groups = x.shape[0], x.shape[1] // matrix.dim
    look_up = looks_up(batch, groups, matrix)
    cut = division_of(matrix.rows, groups, matrix.layers, look_up=look_up, dim=matrix.dim,
                      processors=multiprocessors(x.device))
    partial = workspace((cut.splits, batch, matrix.rows), torch.float32, x.device, "partial sums")
    grid, (codes, width) = (cut.splits, cut.programs), _codes(matrix, groups)
    last = codes.numel() - 1
    if look_up:
        tables = _products_of(x, matrix)
        add_products[grid](codes, tables, partial, matrix.rows, groups, last, cut.chunk, matrix.words, width, batch,
                           cut.rows, cut.groups, num_warps=cut.warps)
    else:
        books, middle = _books(matrix)
        multiply_words[grid](x, codes, books, matrix.mask, matrix.scale, matrix.offset, partial, matrix.rows, groups,
                             last, cut.chunk, middle, matrix.words, matrix.dim, matrix.books == 1, matrix.layers, width,
                             matrix.scale is not None, matrix.offset is not None, batch, cut.rows, cut.groups,
                             num_warps=cut.warps)
    out = torch.empty(batch, matrix.rows, dtype=x.dtype, device=x.device)
    add_splits[(-(-out.numel() // 256),)](partial, out, out.numel(), cut.splits, 256, num_warps=4)
    return out


def _by_blocks(x: Tensor, matrix: Codewords) -> Tensor:
    """Decode blocks of rows, bfloat16 for bfloat16 vectors, else float32, and multiply each."""
    width = x.shape[1]
    groups = width // matrix.dim
    kind = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    step = min(matrix.rows, max(1, BLOCK // width))
    block = workspace((step, width), kind, x.device, "decoded rows")
    given = x.to(kind)
    out = torch.empty(x.shape[0], matrix.rows, dtype=x.dtype, device=x.device)
    codes, packed = _codes(matrix, groups)
    books, middle = _books(matrix)
    each = groups >> matrix.layers
    tile, wide = 16, min(max(8, 32 >> matrix.layers), 1 << (each - 1).bit_length())
    for first in range(0, matrix.rows, step):
        stop = min(first + step, matrix.rows)
        decode_words[(-(-(stop - first) // tile), -(-each // wide))](
            codes, books, matrix.mask, matrix.scale, matrix.offset, block, first, stop, groups, codes.numel() - 1,
            middle, matrix.words, matrix.dim, matrix.books == 1, matrix.layers, packed, matrix.scale is not None,
            matrix.offset is not None, tile, wide, num_warps=4)
        out[:, first:stop] = given @ block[: stop - first].T
    return out


def _codes(matrix: Codewords, groups: int) -> tuple[Tensor, int]:
    """Return codes of a power of two as they are, others unpacked to 8 or 16 bits each; and the bits of one."""
    width, digits, nbytes = radix(matrix.words)
    if width:
        return _stream(matrix.codes, width), width
    kind = torch.uint8 if matrix.words <= 256 else torch.int16
    codes = workspace((matrix.rows * groups,), kind, matrix.codes.device, "unpacked codes")
    grid = (-(-codes.numel() // (digits * 128)),)
    unpack_digits[grid](matrix.codes, codes, codes.numel(), matrix.codes.numel() - 1, matrix.words, digits, nbytes, 128,
                        num_warps=4)
    return codes, 8 * kind.itemsize


def _stream(packed: Tensor, width: int) -> Tensor:
    """Return packed numbers of `width` bits as the kernels read them: bytes, or elements of 16 bits."""
    return packed.view(torch.int16) if width == 16 else packed


def _width(matrix: Codewords) -> int:
    """Return the bits of a codebook's integers, or 0."""
    return matrix.levels.bit_length() - 1 if matrix.levels else 0


def _products_of(x: Tensor, matrix: Codewords) -> Tensor:
    """Return products of vectors and codewords, float32 (batch, groups, words)."""
    batch, groups = x.shape[0], x.shape[1] // matrix.dim
    tables = workspace((batch, groups, matrix.words), torch.float32, x.device, "products of vectors and codewords")
    wide = min(256, 1 << (matrix.words - 1).bit_length())
    books = _stream(matrix.codebooks, _width(matrix))
    make_products[(groups, -(-matrix.words // wide))](
        x, books, matrix.scale, matrix.offset, tables, groups, books.numel() - 1,
        matrix.words, matrix.dim, matrix.books == 1, batch, _width(matrix), matrix.scale is not None,
        matrix.offset is not None, wide, num_warps=4)
    return tables


def _books(matrix: Codewords) -> tuple[Tensor, int]:
    """Return codebooks as floats, and what has been taken off their integers: half their range, which float16 holds."""
    width = _width(matrix)
    if not width:
        return matrix.codebooks, 0
    count, middle = matrix.books * matrix.words * matrix.dim, matrix.levels // 2
    kind = torch.float16 if width <= EXACT else torch.float32
    books = workspace((count,), kind, matrix.codes.device, "unpacked codebooks")
    packed = _stream(matrix.codebooks, width)
    unpack_bits[(-(-count // 1024),)](packed, books, count, packed.numel() - 1, width, middle, 1024, num_warps=4)
    return books, middle
