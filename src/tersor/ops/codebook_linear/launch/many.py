"""Products of 9 to 64 vectors: vectors and codes meet in shared memory."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.ops.codebook_linear.kernels.many import multiply_columns, sum_parts
from tersor.ops.codebook_linear.kernels.prepared import prepare
from tersor.ops.codebook_linear.launch.operand import Operand
from tersor.ops.codebook_linear.shapes.limits import CODES, PARTS, CodeStream, columns_for, stream_of
from tersor.ops.codebook_linear.shapes.many import ManyTiling, many_fitted, many_tiling_for
from tersor.ops.workspace import workspace

PREPARED = 2048  # numbers that a program prepares at most
PREPARING = 512  # programs that prepare at most, where tiles need no sums of their own
SUMMED = 1024  # numbers that a program of `sum_parts` writes


def many_form(bits: int, form: str) -> str:
    """Return the form that the kernel makes use of: symmetric 2-bit codes are looked up, for half the products."""
    if bits == 1 or (form == "affine" and bits != 3):
        return "affine"
    return form if bits == 4 else "any"


def multiply_many_into(out: Tensor, operand: Operand, scales: Tensor, zeros: Tensor | None, group: int,
                       tiling: ManyTiling | None = None) -> None:
    """Write x Wᵀ into `out` (batch, rows), contiguous.

    Parameters
    ----------
    out : Tensor
    operand : Operand
        Of a shape that `many_takes` tells.
    scales : Tensor
        (rows, groups).
    zeros : Tensor or None
        uint8, packed as codes are.
    group : int
        Codes that share a scale.
    tiling : ManyTiling or None
        None: `many_tiling_for`.
    """
    batch, rows = out.shape
    bits, width = operand.bits, operand.x.shape[1]
    grouped = group < width or zeros is not None
    whole = stream_of(bits, width, 1, group if group < width else None)
    assert whole is not None
    chosen = many_fitted(tiling or many_tiling_for(rows, width, batch), whole, batch, grouped)
    stream = dataclasses.replace(whole, warps=chosen.share)
    form = many_form(bits, operand.form)
    summed = grouped and (zeros is not None or form == "affine")
    words = operand.words()[0]
    table = operand.table.to(torch.float16) if bits == 8 else operand.table
    xp, lut, numbers = _prepared(operand, stream, form, summed)
    peaks, totals, sums = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch :]
    target = out
    if chosen.split > 1:
        target = workspace((chosen.split, batch, rows), torch.float32, out.device, "parts of sums")
    multiply_columns[(-(-rows // chosen.rows), chosen.split)](
        words, xp, lut, table, peaks, totals, sums, scales, scales if zeros is None else zeros,
        target, rows, batch, scales.shape[-1] if grouped else 1, scales.stride(0), xp.stride(1), xp.stride(0), bits,
        stream.elements, stream.run, stream.padded, form, group // CODES[bits] if grouped else 0, zeros is not None,
        chosen.share, chosen.row_groups, chosen.rows, columns_for(batch), chosen.split, chosen.stages,
        num_warps=chosen.warps, maxnreg=chosen.registers, launch_pdl=operand.aligned)  # codes are read before the wait
    if chosen.split > 1:
        sum_parts[(-(-batch * rows // SUMMED),)](target, out, batch * rows, chosen.split, SUMMED, launch_pdl=True)


def _prepared(operand: Operand, stream: CodeStream, form: str, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the permuted vectors, the table's bytes, and peaks, totals and (where `summed`) sums of tiles together."""
    x, bits = operand.x, operand.bits
    batch, width = x.shape
    numbers = stream.padded * CODES[bits]
    unit = stream.unit
    while not summed and unit < PREPARED and batch * -(-numbers // unit) > PREPARING:
        unit *= 2
    units = -(-numbers // unit)
    xp = workspace((PARTS[bits] // 2, batch, 2 * stream.padded), torch.float16, x.device, "scaled vectors")
    sums = torch.empty(2 * batch + batch * units, dtype=torch.float32, device=x.device)
    lut = torch.empty(8, dtype=torch.int32, device=x.device)
    prepare[(batch, units)](
        x, operand.table, xp, lut, sums[:batch], sums[batch : 2 * batch], sums[2 * batch :], width, x.stride(0),
        xp.stride(1), xp.stride(0), numbers, bits, form == "affine", False, 4, unit, 1 << (width - 1).bit_length(),
        num_warps=8, launch_pdl=True)
    return xp.view(torch.int32), lut, sums
