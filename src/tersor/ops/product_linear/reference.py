"""Products with matrices of codewords in plain torch: what the kernels mean."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.product_linear.codewords import Codewords
from tersor.payload import codes, packing
from tersor.payload.blocks import row_blocks

LOOKUP_FLOATS = 1 << 22  # entries of the tables of products up to which products are looked up
LOOKUP_BATCH = 8  # vectors up to which they are; beyond, decoding once is cheaper


def multiply(x: Tensor, matrix: Codewords) -> Tensor:
    """Return `x Wᵀ` in the dtype of `x`: products with codewords looked up for few `x`, else by blocks of rows."""
    wide = x.to(torch.float32).reshape(-1, x.shape[-1])
    groups, words, rows = x.shape[-1] // matrix.dim, matrix.words, matrix.rows
    table = table_of(matrix)
    out = torch.empty(wide.shape[0], rows, dtype=torch.float32, device=x.device)
    few = 0 < wide.shape[0] <= LOOKUP_BATCH and words <= rows and not matrix.layers
    if few and wide.shape[0] * groups * words <= LOOKUP_FLOATS:
        parts = wide.reshape(-1, groups, matrix.dim).permute(1, 2, 0)
        products = (table.reshape(-1, words, matrix.dim) @ parts).reshape(groups * words, -1)
        first = torch.arange(groups, device=x.device) * words
        for block in row_blocks((rows, groups)):
            index = codes.read(matrix.codes, (rows, groups), words, block).to(torch.int64) + first
            out[:, block] = torch.nn.functional.embedding_bag(index, products, mode="sum").T
    else:
        for block in row_blocks((rows, x.shape[-1])):
            out[:, block] = wide @ decoded(matrix, table, x.shape[-1], block).T
    return out.to(x.dtype).reshape(*x.shape[:-1], rows)


def gradient(incoming: Tensor, matrix: Codewords, width: int) -> Tensor:
    """Return `incoming @ W`, in the dtype of `incoming`."""
    wide = incoming.to(torch.float32)
    table = table_of(matrix)
    out = torch.zeros(*incoming.shape[:-1], width, dtype=torch.float32, device=incoming.device)
    for block in row_blocks((matrix.rows, width)):
        out += wide[..., block] @ decoded(matrix, table, width, block)
    return out.to(incoming.dtype)


def decoded(matrix: Codewords, table: Tensor, width: int, rows: slice) -> Tensor:
    """Return rows of W, float32 (k, width)."""
    groups = width // matrix.dim
    index = codes.read(matrix.codes, (matrix.rows, groups), matrix.words, rows).to(torch.int64)
    if matrix.books > 1:
        index += torch.arange(groups, device=index.device) * matrix.words
    found = torch.nn.functional.embedding(index, table).reshape(-1, width)
    if matrix.mask is None:
        return found
    flat = codes.read(matrix.mask, (matrix.rows, matrix.layers * (width // 2)), 2, rows)
    return unswap(found, flat.reshape(-1, matrix.layers, width // 2) == 1)


def table_of(matrix: Codewords) -> Tensor:
    """Return all codewords, float32 (books x words, dim)."""
    raw = matrix.codebooks
    if matrix.levels:
        raw = packing.unpack(raw, matrix.levels, 0, matrix.books * matrix.words * matrix.dim)
    wide = raw.reshape(-1, matrix.dim).to(torch.float32)
    if matrix.scale is not None:
        wide = wide * matrix.scale
    return wide + matrix.offset if matrix.offset is not None else wide


def unswap(rows: Tensor, masks: Tensor) -> Tensor:
    """Undo the swaps of `tersor.codecs.transforms.swap`, the last layer first.

    Rows are (k, in), masks bool (k, layers, in / 2).
    """
    count, width = rows.shape
    for layer in range(masks.shape[1] - 1, -1, -1):
        halves = rows.reshape(count, 1 << layer, 2, width >> layer + 1)
        less = masks[:, layer].reshape(count, 1 << layer, width >> layer + 1)
        small, large = halves[:, :, 0], halves[:, :, 1]
        rows = torch.stack([torch.where(less, small, large), torch.where(less, large, small)], -1).reshape(count, width)
    return rows
