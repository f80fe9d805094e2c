"""Filters over streams of signs, and lines decoded from packed bits, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tersor.ops.trellis_linear.shapes import Line, segments, windows
from tersor.payload import codes as packed
from tersor.payload.blocks import Rows


def filtering(x: Tensor, taps: Tensor, scales: Tensor | None, line: Line, *, back: bool) -> Tensor:
    """Return what `trellis_filter` does; arguments as of the op."""
    flat = x.reshape(-1, x.shape[-1])
    made = filtered(flat, taps, line) if back else numbers(flat, taps, line)
    made = made if scales is None else made * scales.to(torch.float32)
    return made.reshape(*x.shape[:-1], -1).to(x.dtype)


def numbers(signs: Tensor, taps: Tensor, line: Line) -> Tensor:
    """Return lines (n, length) from streams (n, stream), float32.

    The filter is summed tap by tap, so that a line's numbers do not depend on the lines beside it.
    """
    sizes, wide = segments(line.length), signs.to(torch.float32)
    parts = wide.split([line.bits(size) for size in sizes], 1)
    made = [summed(part, taps.tolist(), line, size) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(made, 1) if made else wide.new_empty(len(wide), 0)


def summed(circle: Tensor, weights: Sequence[Sequence[float]], line: Line, size: int) -> Tensor:
    """Return a segment's sums of weights (period, memory) times its circle's entries, (n, size) for (n, bits).

    Bit by bit, in the dtype of the entries.
    """
    period, total, each = len(line.shifts), circle.shape[1], sum(line.shifts)
    turns = -(-line.memory // total)  # of the circle that the first window reaches back
    unrolled = torch.cat([circle] * (turns + 1), 1)
    out = circle.new_zeros(len(circle), size)
    for phase in range(min(period, size)):
        newest = turns * total + sum(line.shifts[: phase + 1]) - 1
        last = (-(-(size - phase) // period) - 1) * each + 1
        for age, weight in enumerate(weights[phase]):
            out[:, phase::period].add_(unrolled[:, newest - age : newest - age + last : each], alpha=weight)
    return out


def filtered(lines: Tensor, taps: Tensor, line: Line) -> Tensor:
    """Return what the signs of streams meet instead of lines, (n, stream) for (n, length): `numbers` transposed."""
    weights = tuple(tuple(phase) for phase in taps.tolist())
    parts = lines.to(torch.float32).split(segments(line.length), 1)
    made = [part @ _matrix_of(weights, line, part.shape[1]).to(part.device) for part in parts]
    return torch.cat(made, 1) if made else lines.new_empty(len(lines), 0, dtype=torch.float32)


@lru_cache(maxsize=64)
def _matrix_of(weights: tuple[tuple[float, ...], ...], line: Line, size: int) -> Tensor:
    return matrix(torch.tensor(weights, dtype=torch.float64), line, size).to(torch.float32)


def rows(codes: Tensor, taps: Tensor, scales: Tensor, line: Line, width: int, chosen: Rows, *, across: bool) -> Tensor:
    """Return rows, float32 (k, width); arguments as of `trellis_linear.decoded_rows`."""
    chosen = chosen.to(codes.device) if isinstance(chosen, Tensor) else chosen
    scale = scales.to(torch.float32)[chosen, None]
    if not across:
        shape = (len(scales), line.stream)
        return numbers(_signs(packed.read(codes, shape, 2, chosen)), taps, line).mul_(scale)
    place, phases = (one.to(codes.device)[chosen] for one in windows(line))
    if isinstance(chosen, slice) and len(place):  # bits of neighbours lie side by side
        first = int(place.min())
        needed, place = slice(first, int(place.max()) + 1), place - first
    else:
        needed, place = place.unique(return_inverse=True)
    signs = _signs(packed.read(codes, (line.stream, width), 2, needed))
    return embedding_bag(place, signs, mode="sum", per_sample_weights=taps.to(codes.device)[phases]).mul_(scale)


def _signs(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2).sub_(1)


def matrix(taps: Tensor, line: Line, size: int) -> Tensor:
    """Return the matrix (size, bits) that takes the signs of a segment's circle to its numbers, float64."""
    places, phases, total = line.windows(size)
    out = torch.zeros(size, total, dtype=torch.float64)
    return out.scatter_add_(1, places, taps.to(torch.float64)[phases])
