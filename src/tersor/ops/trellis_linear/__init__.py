"""Linear trellis codes in products: filters between lines and streams of signs, and products by decoding.

A line of numbers is `C β`, `β` the signs of its stream and `C` the matrix of taps, so a product with a line is one with
signs: `x · C β = (Cᵀ x) · β`. Few vectors are filtered (`trellis_filter`) and meet the signs in `codebook_linear`; for
many, lines are decoded (`trellis_linear`). See docs/codecs/trellis.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.ops.dispatch import compiled_allowed, take_reference
from tersor.ops.tapes import Taped
from tersor.ops.trellis_linear import reference
from tersor.ops.trellis_linear.shapes import Line, refusal, segments
from tersor.payload.blocks import Few, Rows, row_blocks


@torch.library.custom_op("tersor::trellis_filter", mutates_args=())
def trellis_filter(x: Tensor, taps: Tensor, scales: Tensor | None, shifts: Sequence[int], length: int, *,
                   back: bool = False) -> Tensor:
    """Return lines of streams, (*batch, length), or, `back`, what streams meet instead of lines, (*batch, stream).

    Parameters
    ----------
    x : Tensor
        (*batch, stream), or (*batch, length): any float dtype, in which results come back; sums are float32.
    taps : Tensor
        float32 (period, memory): the newest bit's first.
    scales : Tensor or None
        (length,): lines are multiplied by them; not with `back`.
    shifts : sequence of int
        New bits a number, by phase.
    length : int
        Numbers of a line.
    """
    return reference.filtering(x, taps, scales, Line(length, tuple(shifts), taps.shape[1]), back=back)


@trellis_filter.register_fake
def _(x: Tensor, taps: Tensor, scales: Tensor | None, shifts: Sequence[int], length: int, *,
      back: bool = False) -> Tensor:
    del scales
    return x.new_empty(*x.shape[:-1], Line(length, tuple(shifts), taps.shape[1]).stream if back else length)


@trellis_filter.register_kernel("cpu")
def _(x: Tensor, taps: Tensor, scales: Tensor | None, shifts: Sequence[int], length: int, *,
      back: bool = False) -> Tensor:
    line = Line(length, tuple(shifts), taps.shape[1])
    if not compiled_allowed("trellis_filter"):
        return reference.filtering(x, taps, scales, line, back=back)
    from tersor.ops.trellis_linear import lanes

    flat = x.reshape(-1, x.shape[-1])
    made = lanes.filtered(flat, taps, line) if back else lanes.numbers(flat, taps, scales, line)
    return made.reshape(*x.shape[:-1], made.shape[1]).to(x.dtype)


@trellis_filter.register_kernel("cuda")
def _(x: Tensor, taps: Tensor, scales: Tensor | None, shifts: Sequence[int], length: int, *,
      back: bool = False) -> Tensor:
    line = Line(length, tuple(shifts), taps.shape[1])
    if take_reference("trellis_filter", refusal(line), x.device):
        return reference.filtering(x, taps, scales, line, back=back)
    from tersor.ops.trellis_linear import launch

    flat = x.reshape(-1, x.shape[-1])
    made = launch.filtered(flat, taps, line, x.dtype) if back else launch.numbers(flat, taps, scales, line, x.dtype)
    return made.reshape(*x.shape[:-1], made.shape[1])


def ready_filter(taps: Tensor, scales: Tensor | None, line: Line, *, back: bool = False) -> Few | None:
    """Return `trellis_filter` of few lines, made ready; None where there is none on a device."""
    if taps.is_cuda and not take_reference("trellis_filter", refusal(line), taps.device):
        from tersor.ops.trellis_linear import launch

        return Taped(lambda x: launch.filtered(x, taps, line, x.dtype) if back
                     else launch.numbers(x, taps, scales, line, x.dtype))
    if taps.device.type != "cpu" or not compiled_allowed("trellis_filter"):
        return None
    from tersor.ops.trellis_linear import lanes

    made = lanes.Filtering.of(taps, scales, line)
    return made.filtered if back else made.numbers


@torch.library.custom_op("tersor::trellis_linear", mutates_args=())
def trellis_linear(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *,
                   across: bool) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`, (*batch, width), by blocks of decoded rows: for many vectors.

    Parameters
    ----------
    codes : Tensor
        uint8, packed bits of the streams: (rows, stream), or, `across` lines that run along outputs, (stream, width).
    taps, shifts
        As of `trellis_filter`.
    scales : Tensor
        (rows,), any float dtype.
    """
    return _by_blocks(x, codes, taps, scales, shifts, across=across)


@trellis_linear.register_fake
def _(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *, across: bool) -> Tensor:
    del codes, taps, shifts, across
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@trellis_linear.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *, across: bool) -> Tensor:
    width = x.shape[-1]
    line = Line(scales.shape[0] if across else width, tuple(shifts), taps.shape[1])
    if take_reference("trellis_linear", _refusal(line, width, across=across), codes.device):
        return _by_blocks(x, codes, taps, scales, shifts, across=across)
    from tersor.ops.trellis_linear import launch

    flat = x.reshape(-1, width)
    return launch.by_decoding(flat, codes, taps, scales, line, across=across).reshape(*x.shape[:-1], -1)


def _refusal(line: Line, width: int, *, across: bool) -> str | None:
    if across and width % 8:
        return f"rows of {width} bits are no whole bytes"
    return refusal(line)


def _by_blocks(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *,
               across: bool) -> Tensor:
    width, count, wide = x.shape[-1], scales.shape[0], x.to(torch.float32)
    line = Line(count if across else width, tuple(shifts), taps.shape[1])
    out = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    for block in row_blocks((count, width)):
        dense = reference.rows(codes, taps, scales, line, width, block, across=across)
        out[..., block] = (wide @ dense.T).to(x.dtype)
    return out


def decoded_rows(codes: Tensor, taps: Tensor, scales: Tensor, line: Line, width: int, rows: Rows, *,
                 across: bool) -> Tensor:
    """Return rows of a matrix of `width` columns, float32 (k, width); the other arguments as of `trellis_linear`."""
    if torch.compiler.is_compiling() and isinstance(rows, Tensor):
        return trellis_rows(codes, taps, scales, rows, line.shifts, width, across=across)
    if codes.is_cuda and not take_reference("trellis_linear", _refusal(line, width, across=across), codes.device):
        from tersor.ops.trellis_linear import launch

        count = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        out = torch.empty(count, width, dtype=torch.float32, device=codes.device)
        return launch.rows(codes, taps, scales, line, rows, out, across=across)
    return reference.rows(codes, taps, scales, line, width, rows, across=across)


@torch.library.custom_op("tersor::trellis_rows", mutates_args=())
def trellis_rows(codes: Tensor, taps: Tensor, scales: Tensor, rows: Tensor, shifts: Sequence[int], width: int, *,
                 across: bool) -> Tensor:
    """Return `decoded_rows` of an index (k,): the operation that compiled graphs call."""
    line = Line(scales.shape[0] if across else width, tuple(shifts), taps.shape[1])
    return decoded_rows(codes, taps, scales, line, width, rows, across=across)


@trellis_rows.register_fake
def _(codes: Tensor, taps: Tensor, scales: Tensor, rows: Tensor, shifts: Sequence[int], width: int, *,
      across: bool) -> Tensor:
    del taps, scales, shifts, across
    return torch.empty(rows.shape[0], width, dtype=torch.float32, device=codes.device)


__all__ = ["Line", "decoded_rows", "ready_filter", "segments", "trellis_filter", "trellis_linear"]
