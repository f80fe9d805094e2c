"""Filters over streams of signs, and lines decoded from packed bits, in plain torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tersor.ops.trellis_linear.shapes import Line, segments
from tersor.payload import codes as packed
from tersor.payload.blocks import Rows


def numbers(signs: Tensor, taps: Tensor, line: Line) -> Tensor:
    """Return lines (n, length) from streams (n, stream), float32.

    The filter is summed tap by tap, so that a line's numbers do not depend on the lines beside it.
    """
    sizes, wide = segments(line.length), signs.to(torch.float32)
    parts = wide.split([line.bits(size) for size in sizes], 1)
    weights = [[float(tap) for tap in phase] for phase in taps]
    made = [_summed(part, weights, line, size) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(made, 1) if made else wide.new_empty(len(wide), 0)


def _summed(signs: Tensor, weights: list[list[float]], line: Line, size: int) -> Tensor:
    """Return a segment's numbers (n, size) from its signs (n, bits), tap by tap."""
    period, total, step = len(line.shifts), signs.shape[1], sum(line.shifts)
    turns = -(-line.memory // total)  # of the circle that the first window reaches back
    circle = torch.cat([*[signs] * turns, signs], 1)
    out = torch.zeros(len(signs), size, dtype=torch.float32, device=signs.device)
    for phase in range(min(period, size)):
        newest = turns * total + sum(line.shifts[: phase + 1]) - 1
        count = -(-(size - phase) // period)
        for age, tap in enumerate(weights[phase]):
            first = newest - age
            out[:, phase::period].add_(circle[:, first : first + (count - 1) * step + 1 : step], alpha=tap)
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
    device = codes.device
    index = torch.arange(chosen.start, chosen.stop, device=device) if isinstance(chosen, slice) else chosen
    place, weights = _line_windows(line, taps.to(device))
    place, weights = place.to(device)[index], weights[index]
    needed, inverse = place.unique(return_inverse=True)
    signs = _signs(packed.read(codes, (line.stream, width), 2, needed))
    mixed = torch.zeros(len(index), len(needed), dtype=torch.float32, device=device)
    return (mixed.scatter_add_(1, inverse, weights) @ signs).mul_(scale)


def _signs(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2).sub_(1)


def _line_windows(line: Line, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return which bits of a line's stream each of its numbers is made of, and their weights: (length, memory)."""
    places, weights, first = [], [], 0
    for size in segments(line.length):
        seen, phases, total = line.windows(size)
        places.append(first + seen)
        weights.append(taps.to(torch.float32)[phases.to(taps.device)])
        first += total
    return torch.cat(places), torch.cat(weights)


def matrix(taps: Tensor, line: Line, size: int) -> Tensor:
    """Return the matrix (size, bits) that takes the signs of a segment's circle to its numbers, float64."""
    places, phases, total = line.windows(size)
    out = torch.zeros(size, total, dtype=torch.float64)
    return out.scatter_add_(1, places, taps.to(torch.float64)[phases])
