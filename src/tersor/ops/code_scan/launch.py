"""The host's side of a scan on CUDA: a launch for bounds of all tiles, and one for the scores of chosen ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.code_scan.kernels.bounds import bound_lookups, bound_many, score_tiles
from tersor.ops.code_scan.shapes import BOUND_TILES, MOST_QUERIES, SIGN_STEP, SIGN_TILES, TILE, WARPS
from tersor.ops.workspace import workspace

if TYPE_CHECKING:
    from tersor.ops.code_scan import Asked, Stack
    from tersor.ops.code_scan.tiles import Terms


def bounds(stack: Stack, asked: Asked, terms: Terms) -> Tensor:
    """Return what the scores of each tile's rows do not exceed, float32 (queries, tiles)."""
    (tiles, columns, _), (queries, lookups, size) = stack.codes.shape, asked.tables.shape
    weights, bases, steps, based = _around(asked)
    out = workspace((queries, tiles), torch.float32, stack.codes.device, "bounds of a search")
    held = (stack.factors, stack.offsets, _there(stack, asked), stack.pieces, weights, bases, terms.whole, out,
            *stack.peaks, terms.step, tiles)
    with torch.cuda.device(stack.codes.device):
        if terms.products is None:
            words, each = stack.codes.view(torch.int32), 4 // stack.codes.itemsize
            bound_lookups[(-(-tiles // BOUND_TILES), queries)](
                words, terms.tables, *held, *steps, columns, lookups, size, based, BOUND_TILES, each, num_warps=4)
            return out
        block = min(MOST_QUERIES, max(16, 1 << (queries - 1).bit_length()))
        width = terms.products.shape[1]
        wide, tall = -(-queries // block) * block, -(-width // SIGN_STEP) * SIGN_STEP
        products = torch.zeros(tall, wide, dtype=torch.float16, device=out.device)
        products[:width, :queries] = terms.products.T
        books, stages = (products, 0) if stack.words is None else (stack.words.books, stack.words.stages)
        words, each = (0, 0) if stack.words is None else books.shape[1:]
        bound_many[(wide // block * -(-tiles // SIGN_TILES),)](
            stack.codes, products, books, terms.unit, terms.lost, *held, queries, wide, *steps, columns, width, size,
            words, each, stages, based, SIGN_TILES, block, SIGN_STEP, num_warps=WARPS)
    return out


def scores(stack: Stack, asked: Asked, queries: Tensor | None, tiles: Tensor) -> Tensor:
    """Return the scores of the rows of tiles, float64 (n, TILE); see `tiles.scores_of`."""
    columns, (_, lookups, size), counted = stack.codes.shape[1], asked.tables.shape, queries is None
    each, tiles = (tiles.shape[1], tiles.reshape(-1)) if counted else (1, tiles)
    asking, tables = tiles if queries is None else queries, asked.tables.contiguous()
    weights, bases, steps, based = _around(asked)
    out = workspace((len(tiles), TILE), torch.float64, stack.codes.device, "scores of a search")
    if len(tiles):
        with torch.cuda.device(stack.codes.device):
            score_tiles[(len(tiles),)](
                stack.codes, tables, stack.factors, stack.offsets, _there(stack, asked), stack.pieces, weights,
                bases, asking, tiles, out, each, *steps, columns, lookups, size, based, counted, num_warps=2)
    return out


def _around(asked: Asked) -> tuple[Tensor, Tensor, tuple[int, int, int], bool]:
    """Return weights, bases, the steps from a query's bases and weights to the next one's, and from a piece's weight.

    Last whether there are bases: minus infinity for pieces that are not looked at; else all are 0.
    """
    weights, bases = asked.weights, asked.based()
    if bases is None and weights.shape[1] > 1:
        bases = torch.zeros_like(weights)
    bases = None if bases is None else bases.contiguous()
    based = bases is not None
    steps = (bases.shape[1] if based else 0, weights.stride(0), weights.stride(1) if weights.shape[1] > 1 else 0)
    return weights, bases if based else weights, steps, based


def _there(stack: Stack, asked: Asked) -> Tensor:
    return stack.there if asked.masks is None else asked.masks[0]
