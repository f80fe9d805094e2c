"""Trellis codes in products by a table of their windows' numbers, for windows of at most 16 bits: any such code's.

On the processor few vectors meet numbers as they are decoded, in registers; for many, blocks of rows are decoded. See
docs/codecs/trellis.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.dispatch import compiled_allowed
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.window_linear import reference
from tersor.ops.window_linear.shapes import FEW, MOST_MEMORY, refusal
from tersor.payload.blocks import Few, Rows, row_blocks

if TYPE_CHECKING:
    from tersor.ops.window_linear import lanes


@torch.library.custom_op("tersor::window_linear", mutates_args=())
def window_linear(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, shifts: Sequence[int], *,
                  across: bool) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`, (*batch, width), any float dtype; sums are float32.

    Parameters
    ----------
    codes : Tensor
        uint8, packed bits of the streams: (rows, stream), or, `across` lines that run along outputs, (stream, width).
    table : Tensor
        float32 (period, 2**memory): the number of every window, whose newest bit is the lowest.
    scales : Tensor
        (rows,), any float dtype.
    shifts : sequence of int
        New bits a number, by phase.
    """
    width, count = x.shape[-1], len(scales)
    line, flat = _line(table, shifts, count if across else width), x.detach().flatten(0, -2) if x.ndim > 1 else x[None]
    if flat.numel() and _compiled(codes, line, across=across):
        matrix = _matrix(codes, table, scales, line, width, across=across)
        if len(flat) <= FEW:
            out = torch.from_numpy(matrix.few(flat.to(torch.float32).contiguous().numpy())).to(x.dtype)
        else:
            out = matrix.many(flat)
    else:
        out = torch.empty(len(flat), count, dtype=x.dtype, device=x.device)
        for block in row_blocks((count, width)):
            dense = reference.rows(codes, table, scales, line, width, block, across=across)
            out[:, block] = (flat.to(torch.float32) @ dense.T).to(x.dtype)
    return out.reshape(*x.shape[:-1], count)


@window_linear.register_fake
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, shifts: Sequence[int], *, across: bool) -> Tensor:
    del codes, table, shifts, across
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def ready_windows(codes: Tensor, table: Tensor, scales: Tensor, line: Line, width: int, *, across: bool) -> Few | None:
    """Return `window_linear` of few vectors, made ready; None where there is none on a device."""
    if not width or not _compiled(codes, line, across=across):
        return None
    return _matrix(codes, table, scales, line, width, across=across).few


def decoded_rows(codes: Tensor, table: Tensor, scales: Tensor, line: Line, width: int, rows: Rows, *,
                 across: bool) -> Tensor:
    """Return rows of a matrix of `width` columns, float32 (k, width); the other arguments as of `window_linear`.

    The same bits from all implementations: numbers are those of the table, rounded once when they are scaled.
    """
    if torch.compiler.is_compiling() and isinstance(rows, Tensor):
        return window_rows(codes, table, scales, rows, line.shifts, width, across=across)
    if width and _compiled(codes, line, across=across):
        rows = rows if isinstance(rows, slice) else rows.cpu()
        return _matrix(codes, table, scales, line, width, across=across).rows(rows)
    return reference.rows(codes, table, scales, line, width, rows, across=across)


@torch.library.custom_op("tersor::window_rows", mutates_args=())
def window_rows(codes: Tensor, table: Tensor, scales: Tensor, rows: Tensor, shifts: Sequence[int], width: int, *,
                across: bool) -> Tensor:
    """Return `decoded_rows` of an index (k,): the operation that compiled graphs call."""
    line = _line(table, shifts, len(scales) if across else width)
    return decoded_rows(codes, table, scales, line, width, rows, across=across)


@window_rows.register_fake
def _(codes: Tensor, table: Tensor, scales: Tensor, rows: Tensor, shifts: Sequence[int], width: int, *,
      across: bool) -> Tensor:
    del table, scales, shifts, across
    return torch.empty(rows.shape[0], width, dtype=torch.float32, device=codes.device)


def _line(table: Tensor, shifts: Sequence[int], length: int) -> Line:
    return Line(length, tuple(shifts), table.shape[1].bit_length() - 1)


def _compiled(codes: Tensor, line: Line, *, across: bool) -> bool:
    return (codes.device.type == "cpu" and refusal(line, across=across) is None and line.length > 0
            and not torch.compiler.is_compiling() and compiled_allowed("window_linear"))


def _matrix(codes: Tensor, table: Tensor, scales: Tensor, line: Line, width: int, *, across: bool) -> lanes.Matrix:
    from tersor.ops.window_linear import lanes

    return (lanes.Across if across else lanes.Along)(codes.numpy(), table.contiguous(), scales, line, width)


__all__ = ["MOST_MEMORY", "Line", "decoded_rows", "ready_windows", "window_linear"]
