"""Products of up to 8 vectors, or 16 with two streams of codes: vectors are prepared, then multiplied."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.ops.codebook_linear.kernels.few import multiply_rows
from tersor.ops.codebook_linear.kernels.prepared import prepare
from tersor.ops.codebook_linear.launch.operand import Operand
from tersor.ops.codebook_linear.shapes.few import Tiling, fitted, kind_of, near_columns, tiling_for
from tersor.ops.codebook_linear.shapes.limits import CODES, PARTS, TILE, CodeStream, columns_for, stream_of
from tersor.ops.workspace import multiprocessors, workspace


def multiply_few_into(out: Tensor, operands: Sequence[Operand], scales: Tensor, zeros: Tensor | None, group: int,
                      tiling: Tiling | None) -> None:
    """Write into `out` (batch, rows) the sum over one or two operands of x Wᵀ; see `multiply_into`."""
    batch, rows = out.shape
    columns, two = columns_for(batch), len(operands) > 1
    width = max(operand.x.shape[1] for operand in operands)
    grouped = group < operands[0].x.shape[1] or zeros is not None
    kind = kind_of([operand.bits for operand in operands], fields=operands[0].fields, grouped=grouped)
    tiling = tiling or tiling_for(kind, rows, width, batch)
    prepared = [_prepared(operand, tiling, group if group < width else None, two) for operand in operands]
    (first, one), (second, other) = prepared[0], prepared[-1]
    streams = [stream for stream, _ in prepared]
    near = near_columns(batch, streams)
    tiling = fitted(tiling, streams, near)
    programs = min(-(-rows // tiling.rows), tiling.programs * multiprocessors(out.device))
    multiply_rows[(programs,)](
        *one.pointers(), *other.pointers(), scales, scales if zeros is None else zeros, out, rows, batch,
        scales.shape[-1] if grouped else 1, scales.stride(0), one.xp.stride(1), one.xp.stride(0),
        other.xp.stride(1), other.xp.stride(0), first.bits, first.elements, first.run, first.padded,
        operands[0].few_form, second.bits if two else 0, second.elements, second.run, second.padded,
        operands[-1].few_form, group // CODES[first.bits] if grouped else 0, zeros is not None, tiling.warps,
        tiling.rows, columns, two, near, tiling.stages, num_warps=tiling.warps,
        launch_pdl=all(operand.aligned for operand in operands))  # codes are read before the wait


@dataclasses.dataclass(frozen=True, eq=False)
class _Prepared:
    """What `prepare` wrote, and the codes as the kernel reads them."""

    codes: Tensor
    xp: Tensor
    lut: Tensor
    table: Tensor
    peaks: Tensor
    totals: Tensor
    sums: Tensor

    def pointers(self) -> tuple[Tensor, ...]:
        return self.codes, self.xp, self.lut, self.table, self.peaks, self.totals, self.sums


def _prepared(operand: Operand, tiling: Tiling, group: int | None, mirrored: bool) -> tuple[CodeStream, _Prepared]:
    x, bits = operand.x, operand.bits
    batch, width = x.shape
    stream = stream_of(bits, width, tiling.warps, group)
    assert stream is not None
    units = stream.padded // TILE
    xp = workspace((PARTS[bits] // 2, batch, 2 * stream.padded), torch.float16, x.device, "scaled vectors")
    numbers = torch.empty(2 * batch + batch * units, dtype=torch.float32, device=x.device)
    peaks, totals, sums = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch :]
    lut = torch.empty(8, dtype=torch.int32, device=x.device)
    prepare[(batch, units)](x, operand.table, xp, lut, peaks, totals, sums, width, x.stride(0), xp.stride(1),
                            xp.stride(0), stream.padded * CODES[bits], bits, operand.fields, mirrored, stream.run,
                            stream.unit, 1 << (width - 1).bit_length(), num_warps=8, launch_pdl=True)
    table = operand.table.to(torch.float16) if bits == 8 else operand.table
    return stream, _Prepared(operand.words()[0], xp.view(torch.int32), lut, table, peaks, totals, sums)
