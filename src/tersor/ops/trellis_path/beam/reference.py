"""Beams in plain torch: what the compiled walk means.

A step: survivors that agree in all bits that stay are merged, the cheapest stays, of equals the first. Every one of
them takes all new bits; candidates are in the order of their new bits, the newest first, then of their survivors: so
survivors are in the order of their windows' bits, newest first, and those that agree are neighbours. Costs less the
least of them fall into bins, 32 a power of two; bins are taken from the cheapest on, candidates of the last one in
their order.

A first walk over the seam finds the window at it. The second one starts with that window, and ends with it: the last
`memory` bits that enter are its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.trellis_path.beam.sums import Sums, backwards, mask

BIN = 18  # bits of a float32 that do not tell bins apart: 5 of the 23 after the point do
FOLD = 16


def entering(numbers: Tensor, sums: Sums, width: int) -> Tensor:
    """Return the bits that enter at every step, uint8 (n, length), for float32 numbers (n, length)."""
    found = [_bitten(row, sums, width) for row in numbers.cpu()]
    return (torch.stack(found) if found else numbers.new_empty(numbers.shape, dtype=torch.uint8)).to(numbers.device)


def _bitten(row: Tensor, sums: Sums, width: int) -> Tensor:
    length = len(row)
    warm = sums.steps.warm(length)
    seam = [*range(length - warm, length), *range(warm)] if warm else [*range(length)]
    starts = sums.starts(width)
    first, bits = walk(row, sums, width, starts, seam, None)
    window = first
    for place, new in list(zip(seam, bits.tolist(), strict=True))[: warm or length]:
        window = after(window, sums.steps.shifts[place % len(sums.steps.shifts)], new, sums.steps.memory)
    return walk(row, sums, width, torch.tensor([window]), [*range(length)], window)[1]


def after(window: int, shift: int, new: int, memory: int) -> int:
    """Return the window after bits have entered, as int64 holds it."""
    moved = (window << shift | new) & (1 << memory) - 1
    return moved - (1 << 64) if moved >> 63 else moved


def walk(row: Tensor, sums: Sums, width: int, starts: Tensor, places: list[int], end: int | None) -> tuple[int, Tensor]:
    """Return the start of the best path that a beam finds, and the bits that enter, uint8 (places,).

    Parameters
    ----------
    starts : Tensor
        Windows to start with, int64.
    end : int or None
        The window to end with.
    """
    shifts, memory = sums.steps.shifts, sums.steps.memory
    tables, news = sums.pieces()
    windows, cost, history = starts, torch.zeros(len(starts), dtype=torch.float32), []
    left = sum(shifts[place % len(shifts)] for place in places)
    for place in places:
        phase = place % len(shifts)
        shift = shifts[phase]
        left -= shift
        kept = windows & mask(memory - shift)
        order = cost.argsort(stable=True)  # the first of equals is the cheapest, and of those the first
        keys, group = kept.unique(return_inverse=True)
        best = torch.full((len(keys),), -1).scatter_(0, group[order.flip(0)], order.flip(0))
        best = _by_first(best, group)
        moved = kept[best] << shift
        new = backwards(torch.arange(1 << shift), shift)
        if end is not None and left < memory:
            forced = mask(min(shift, memory - left))
            new = new[(new ^ end >> left) & forced == 0]
        level = sum(tables[phase, i, moved >> 8 * i & 255] for i in range(tables.shape[1])) + news[phase, new, None]
        if sums.curve is not None:
            level = sums.curve[level.to(torch.int64) & (1 << FOLD) - 1]
        error = row[place] - level
        costs = (cost[best] + error * error).flatten()
        costs = costs - costs.min()
        chosen = (costs.view(torch.int32) >> BIN).argsort(stable=True)[:width].sort().values
        parent = chosen % len(best)
        entered = new[chosen // len(best)]
        windows, cost = moved[parent] | entered, costs[chosen]
        history.append((best[parent], entered))
    at, found = int(cost.argmin()), []
    for parent, entered in reversed(history):
        found.append(int(entered[at]))
        at = int(parent[at])
    return int(starts[at]), torch.tensor(found[::-1], dtype=torch.uint8)


def _by_first(best: Tensor, group: Tensor) -> Tensor:
    """Return the best of groups in the order in which groups appear."""
    first = torch.full((len(best),), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), "amin")
    return best[first.argsort()]
