"""Rows of windows' numbers in plain torch: states are put together bit by bit and looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.trellis_linear.shapes import Line, windows
from tersor.payload import codes as packed
from tersor.payload.blocks import Rows


def rows(codes: Tensor, table: Tensor, scales: Tensor, line: Line, width: int, chosen: Rows, *, across: bool) -> Tensor:
    """Return rows, float32 (k, width); arguments as of `window_linear.decoded_rows`."""
    chosen = chosen.to(codes.device) if isinstance(chosen, Tensor) else chosen
    scale = scales.to(torch.float32)[chosen, None]
    if not line.length or not width:
        return scale.new_empty(len(scale), width)
    places, phases = (one.to(codes.device) for one in windows(line))
    if across:
        places, phases = places[chosen], phases[chosen, None]
        if isinstance(chosen, slice) and len(places):  # bits of neighbours lie side by side
            first = int(places.min())
            needed, places = slice(first, int(places.max()) + 1), places - first
        else:
            needed, places = places.unique(return_inverse=True)
        bits = packed.read(codes, (line.stream, width), 2, needed).to(torch.int32)
        states = _states(bits, places, 0)
    else:
        bits = packed.read(codes, (len(scales), line.stream), 2, chosen).to(torch.int32)
        states = _states(bits, places, 1)
    return table.reshape(-1)[states + (phases << line.memory)].mul_(scale)


def _states(bits: Tensor, places: Tensor, axis: int) -> Tensor:
    """Return windows, the newest bit lowest, whose bits are those at `places` (numbers, memory) of an axis."""
    out = bits.index_select(axis, places[:, 0])
    for age in range(1, places.shape[1]):
        out += bits.index_select(axis, places[:, age]) << age
    return out


