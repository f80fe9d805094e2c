"""Rows from tables on the processor: arrays for the compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tersor.ops.trellis_table.kernels.looks import look, look_across
from tersor.ops.workers import share


def rows(codes: Tensor, table: Tensor, line: tuple[Sequence[int], Sequence[int]], chosen: Tensor,
         across: int | None) -> Tensor:
    """Return rows of numbers, float32 (k, width); see `table_rows`."""
    shifts, sizes = line
    out = torch.empty(len(chosen), sum(sizes) if across is None else across, dtype=torch.float32)
    kernel = look if across is None else look_across
    told = (np.array(shifts, dtype=np.int64), np.array(sizes, dtype=np.int64), table.shape[1].bit_length() - 1)
    held, known, index, made = codes.numpy(), table.numpy(), chosen.numpy(), out.numpy()

    def work(span: tuple[int, int]) -> None:
        kernel(held, known, told, index[slice(*span)], made[slice(*span)])

    share(len(chosen), out.numel(), work)
    return out
