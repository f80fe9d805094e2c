"""What scalar codecs share: writing and reading one packed code an element, by rows, at random, and by columns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tersor.contract.codec import ColumnEncoder, Encoded, Rows, Shape, row_blocks
from tersor.payload import packing


def write(shape: Shape, levels: int, device: torch.device, assign: Callable[[slice], Tensor]) -> Tensor:
    """Pack the codes that `assign` returns for each block of rows: a 1-D uint8 tensor."""
    packed = torch.empty(packing.packed_nbytes(math.prod(shape), levels), dtype=torch.uint8, device=device)
    multiple = packing.group_codes(levels)
    for block in row_blocks(shape, multiple):
        part = packing.pack(assign(block), levels)
        first = packing.packed_nbytes(block.start * shape[1], levels)
        packed[first : first + part.numel()] = part
    return packed


def read(packed: Tensor, shape: Shape, levels: int, rows: Rows) -> Tensor:
    """Return the codes of `rows`, (k, in)."""
    width = shape[1]
    if isinstance(rows, slice):
        return packing.unpack(packed, levels, rows.start * width, rows.stop * width).reshape(-1, width)
    index = rows.to(packed.device).unsqueeze(-1) * width + torch.arange(width, device=packed.device)
    return packing.unpack_at(packed, levels, index)


def mirrored(half: Tensor, count: int) -> Tensor:
    """Return `count` symmetric levels in the order of their codes, from the positive ones, innermost first.

    Not sorted: a pair of levels that no element uses is fitted as 0, and codes must keep their meaning.
    """
    return torch.cat([-half.flip(0), *([half.new_zeros(1)] if count % 2 else []), half])


class ScalarColumns(ColumnEncoder):
    """Column encoder of a scalar codec whose parameters are fixed beforehand.

    Parameters
    ----------
    shape : (int, int)
    levels : int
    assign : callable
        (columns (out, k), first column) to codes (out, k).
    value : callable
        (codes (out, k), first column) to decoded columns (out, k).
    close : callable
        Packed codes to the `Encoded` result.
    device : torch.device
    """

    width = 1

    def __init__(self, shape: Shape, levels: int, assign: Callable[[Tensor, int], Tensor],
                 value: Callable[[Tensor, int], Tensor], close: Callable[[Tensor], Encoded],
                 device: torch.device) -> None:
        self._codes = torch.zeros(shape, dtype=torch.uint8 if levels <= 256 else torch.int32, device=device)
        self._levels = levels
        self._assign, self._value, self._close = assign, value, close

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        codes = self._assign(columns, start)
        self._codes[:, start : start + columns.shape[1]] = codes
        return self._value(codes, start)

    def finish(self) -> Encoded:
        """Pack all codes; see `ColumnEncoder`."""
        return self._close(packing.pack(self._codes, self._levels))
