"""The column encoder of codecs with one code an element, which error feedback drives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.contract.codec import ColumnEncoder, Encoded
from tersor.payload import packing
from tersor.payload.blocks import Shape


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
