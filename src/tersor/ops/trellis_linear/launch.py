"""Filters and decoding on CUDA: launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.trellis_linear.kernels import across as over
from tersor.ops.trellis_linear.kernels import decoded, filtering, halves
from tersor.ops.trellis_linear.shapes import UNIT, Line, segments
from tersor.ops.workspace import workspace
from tersor.payload.blocks import Rows

BLOCK = 128  # numbers that a program decodes
FILTERED = 64  # numbers that a program filters
ROWS, BYTES = 16, 32  # of a program that decodes across lines
WORDS = 16  # the same, of 32 numbers
WINDOW = 33  # bits that two words hold from any place on
WORD, HALF = 32, 2  # bits; bytes
DECODED_BYTES = 1 << 26  # of rows at a time


def _places(line: Line) -> tuple[int, int]:
    """Return how a line is cut: units, segments."""
    return max(1, line.length // UNIT), len(segments(line.length))


def numbers(signs: Tensor, taps: Tensor, scales: Tensor | None, line: Line, dtype: torch.dtype) -> Tensor:
    """Return lines (n, length) of `signs` (n, stream), times `scales` (length,) where given."""
    out = torch.empty(len(signs), line.length, dtype=dtype, device=signs.device)
    if out.numel():
        with torch.cuda.device(signs.device):
            filtering.numbers[(-(-line.length // FILTERED), len(signs))](
                signs.contiguous(), taps, taps if scales is None else scales, out, line.length, line.stream,
                *_places(line), UNIT, line.shifts, sum(line.shifts), line.memory, scales is not None, FILTERED,
                1 << (line.memory - 1).bit_length(), launch_pdl=True)
    return out


def filtered(lines: Tensor, taps: Tensor, line: Line, dtype: torch.dtype) -> Tensor:
    """Return what the signs of streams meet, (n, stream), of `lines` (n, length)."""
    out = torch.empty(len(lines), line.stream, dtype=dtype, device=lines.device)
    period, step = len(line.shifts), sum(line.shifts)
    steps = (-(-line.memory // step) + 1) * period
    if out.numel():
        with torch.cuda.device(lines.device):
            filtering.filtered[(-(-line.stream // FILTERED), len(lines))](
                lines.contiguous(), taps, out, line.length, line.stream, *_places(line), UNIT, line.shifts, step,
                line.memory, steps, FILTERED, 1 << (steps - 1).bit_length(), launch_pdl=True)
    return out


def rows(codes: Tensor, taps: Tensor, scales: Tensor, line: Line, chosen: Rows, out: Tensor, *,
         across: bool) -> Tensor:
    """Write rows into `out`, (k, width), which is returned."""
    count, width = out.shape
    if not out.numel():
        return out
    indexed = isinstance(chosen, Tensor)
    index, first = (chosen.to(codes.device), 0) if indexed else (codes, chosen.start)
    shared = (*_places(line), UNIT, line.shifts, sum(line.shifts), line.memory)
    with torch.cuda.device(codes.device):
        if across:
            grid = (-(-count // ROWS), -(-width // (8 * BYTES)))
            decoded.decode_across[grid](codes, taps, scales, out, index, first, count, width, line.length, *shared,
                                        ROWS, BYTES, indexed)
        else:
            decoded.decode_along[(count, -(-width // BLOCK))](codes, taps, scales, out, index, first, line.length,
                                                              line.stream, *shared, BLOCK, indexed)
    return out


def halved(codes: Tensor, line: Line, width: int, out: Tensor, *, across: bool) -> bool:
    """Tell whether rows in the dtype of `out` are decoded two numbers at a time."""
    whole = width % WORD == 0 if across else codes.numel() % (WORD // 8) == 0 and line.memory <= WINDOW
    return out.element_size() == HALF and whole and codes.data_ptr() % (WORD // 8) == 0


def in_halves(codes: Tensor, taps: Tensor, scales: Tensor, line: Line, first: int, out: Tensor, *,
              across: bool) -> None:
    """Write rows from `first` on into `out`, (k, width), of 16 bits a number."""
    count, width = out.shape
    words = codes.view(torch.int32)
    shared = (*_places(line), UNIT, line.shifts, sum(line.shifts), line.memory)
    if across:
        grid = (-(-count // ROWS), -(-width // (WORD * WORDS)))
        over.decode_across[grid](words, taps, scales, out, first, count, width, line.length, *shared, ROWS, WORDS)
    else:
        sizes = segments(line.length)
        pairs = max(32, 1 << (max(sizes) - 1).bit_length() - 1)
        halves.decode_along[count, len(sizes)](words, taps, scales, out, first, words.numel(), line.length, line.stream,
                                               *shared, pairs, num_warps=1)


def by_decoding(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, line: Line, *, across: bool) -> Tensor:
    """Return x Wᵀ, (batch, rows), by blocks of rows decoded to the dtype of `x`, (batch, width)."""
    count, width = scales.numel(), x.shape[1]
    out = torch.empty(len(x), count, dtype=x.dtype, device=x.device)
    step = max(1, DECODED_BYTES // max(1, width * x.element_size()) // 128 * 128)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        dense = workspace((part.stop - part.start, width), x.dtype, x.device, "decoded rows")
        if halved(codes, line, width, dense, across=across):
            in_halves(codes, taps, scales, line, start, dense, across=across)
        else:
            rows(codes, taps, scales, line, part, dense, across=across)
        torch.mm(x, dense.T, out=out[:, part])
    return out
