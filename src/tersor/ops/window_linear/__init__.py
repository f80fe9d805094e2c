"""Trellis codes in products by a table of their windows' numbers, for windows of at most 16 bits: any such code's.

Few vectors meet numbers as they are decoded, in registers; for many, blocks of rows are decoded. README.md says how on
CUDA, docs/codecs/trellis.md what windows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.dispatch import compiled_allowed, take_reference
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_linear.shapes import refusal as line_refused
from tersor.ops.window_linear import reference
from tersor.ops.window_linear.shapes.lanes import FEW, MOST_MEMORY, refusal
from tersor.ops.window_linear.shapes.tables import MOST_VECTORS, Look, summed
from tersor.ops.window_linear.shapes.tables import image as made
from tersor.ops.window_linear.shapes.tables import refusal as table_refused
from tersor.payload.blocks import Few, Rows, row_blocks

if TYPE_CHECKING:
    from tersor.ops.window_linear import lanes


@torch.library.custom_op("tersor::window_linear", mutates_args=())
def window_linear(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, shifts: Sequence[int],
                  image: Tensor | None = None, *, across: bool) -> Tensor:
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
    image : Tensor or None
        `image_of` the table, on the device; without it, CUDA decodes rows also for few vectors.
    """
    del image
    width, count = x.shape[-1], len(scales)
    line, flat = _line(table, shifts, count if across else width), x.detach().flatten(0, -2) if x.ndim > 1 else x[None]
    if flat.numel() and _compiled(codes, line, across=across):
        matrix = _matrix(codes, table, scales, line, width, across=across)
        if len(flat) <= FEW:
            out = torch.from_numpy(matrix.few(flat.to(torch.float32).contiguous().numpy())).to(x.dtype)
        else:
            out = matrix.many(flat)
    else:
        out = _by_blocks(flat, codes, table, scales, line, across=across)
    return out.reshape(*x.shape[:-1], count)


@window_linear.register_fake
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, shifts: Sequence[int],
      image: Tensor | None = None, *, across: bool) -> Tensor:
    del codes, table, shifts, across, image
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@window_linear.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, shifts: Sequence[int],
      image: Tensor | None = None, *, across: bool) -> Tensor:
    width, count = x.shape[-1], len(scales)
    line, flat = _line(table, shifts, count if across else width), x.reshape(-1, width)
    if take_reference("window_linear", _refused(line, x), x.device):
        return _by_blocks(flat, codes, table, scales, line, across=across).reshape(*x.shape[:-1], count)
    from tersor.ops.window_linear import launch

    matrix = launch.Matrix(codes, table, image, scales, line, width, across)
    halves = x.element_size() == launch.HALF  # few vectors meet numbers of 16 bits, which float32 is not for
    if halves and 0 < len(flat) <= MOST_VECTORS and matrix.refusal is None:
        out = launch.few(flat.contiguous(), matrix)
    else:
        out = launch.by_decoding(flat, matrix)
    return out.reshape(*x.shape[:-1], count)


def image_of(table: Tensor, shifts: Sequence[int], *, linear: bool = False) -> Tensor:
    """Return a table as kernels for CUDA hold it, int32; empty where it is too long for them.

    `linear`: its numbers are a filter's, so that they may be sums of what two halves of the window have.
    """
    key = tuple(shifts), table.shape[1].bit_length() - 1
    look = Look(*key, sums=linear and summed(*key))
    return made(table, look) if look.fits else torch.empty(0, dtype=torch.int32, device="cpu")


def takes(line: Line, rows: int, width: int, *, across: bool, linear: bool = False) -> bool:
    """Tell whether CUDA multiplies few vectors without decoding whole rows; `linear` as of `image_of`."""
    sums = linear and summed(line.shifts, line.memory)
    return table_refused(line, rows, width, across=across, sums=sums) is None


def _refused(line: Line, x: Tensor) -> str | None:
    if not x.numel() or not line.length:
        return "there is nothing to multiply"
    return line_refused(line)


def _by_blocks(flat: Tensor, codes: Tensor, table: Tensor, scales: Tensor, line: Line, *, across: bool) -> Tensor:
    """Return products, (n, rows), with blocks of rows in plain torch."""
    width, count = flat.shape[1], len(scales)
    out = torch.empty(len(flat), count, dtype=flat.dtype, device=flat.device)
    for block in row_blocks((count, width)):
        dense = reference.rows(codes, table, scales, line, width, block, across=across)
        out[:, block] = (flat.to(torch.float32) @ dense.T).to(flat.dtype)
    return out


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
    taken = codes.is_cuda and line.length and width
    if taken and not take_reference("window_linear", line_refused(line), codes.device):
        from tersor.ops.window_linear import launch

        matrix = launch.Matrix(codes, table, None, scales, line, width, across)
        count = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        return launch.rows(matrix, rows, torch.empty(count, width, dtype=torch.float32, device=codes.device))
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


__all__ = ["MOST_MEMORY", "Line", "decoded_rows", "image_of", "ready_windows", "takes", "window_linear"]
