"""Rows of trellis codes whose windows have any number: one look at a table a number, on the processor.

The meaning is that of `codecs.trellis.windows.Window.numbers`, which decodes bit by bit; where this op does not run,
that does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.ops.dispatch import compiled_allowed, log_once

MOST_MEMORY = 16  # bits of a window whose table fits in a cache


def table_rows(codes: Tensor, table: Tensor, line: tuple[Sequence[int], Sequence[int]], rows: Tensor,
               across: int | None = None) -> Tensor | None:
    """Return rows of numbers, float32 (k, width); None where no kernel takes them.

    Parameters
    ----------
    codes : Tensor
        Packed bits of all lines, uint8; every line is a stream of segments, each a circle.
    table : Tensor
        The number of every window, float32 (period, 2**memory), as `mirrored` returns it.
    line : (shifts, sizes)
        New bits a number, by phase, and numbers of the segments.
    rows : Tensor
        int64 (k,).
    across : int or None
        The width of rows where lines are columns; None: lines are rows.
    """
    shifts, sizes = line
    memory = table.shape[1].bit_length() - 1
    least = min((sum((tuple(shifts) * size)[:size]) for size in set(sizes)), default=0)
    if codes.device.type != "cpu" or not compiled_allowed("trellis_table"):
        return None
    if memory > MOST_MEMORY or least < memory:
        log_once("trellis_table", f"a window of {memory} bits is beyond {MOST_MEMORY}, or a circle of {least} shorter")
        return None
    from tersor.ops.trellis_table import compiled

    return compiled.rows(codes, table, line, rows, across)


def mirrored(table: Tensor) -> Tensor:
    """Return a table by windows that were read from a stream: the oldest bit is the lowest of the index."""
    memory = table.shape[1].bit_length() - 1
    places = torch.zeros(1 << memory, dtype=torch.int64)
    for bit in range(memory):
        places |= (torch.arange(1 << memory) >> bit & 1) << memory - 1 - bit
    return table[:, places].contiguous()


__all__ = ["mirrored", "table_rows"]
