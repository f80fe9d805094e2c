"""Products of 9 to 64 vectors with packed codes on CUDA: the host's side of `wide_kernels`. See README.md."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tersor.ops.codebook_linear.kernels import prepare
from tersor.ops.codebook_linear.shapes import (
    CODES,
    MULTIPROCESSOR_BYTES,
    PARTS,
    REGISTERS,
    TILE,
    Stream,
    columns_for,
    stream_of,
)
from tersor.ops.codebook_linear.wide_kernels import multiply_columns, sum_parts
from tersor.ops.workspace import workspace

if TYPE_CHECKING:
    from tersor.ops.codebook_linear.triton import Operand

WIDE_BITS = (1, 2, 3, 4, 8)
FEWEST, MOST = 9, 64  # vectors
RESERVED_BYTES = 1024  # of each program's shared memory that is the driver's
PREPARED = 2048  # numbers that a program prepares at most
PREPARING = 512  # programs that prepare at most, where tiles need no sums of their own
SUMMED = 1024  # numbers that a program of `sum_parts` writes


@dataclasses.dataclass(frozen=True)
class WideTiling:
    """How work is divided: a program takes `16 rows16 groups` rows and one of `split` parts of each row.

    Attributes
    ----------
    rows16 : int
        Tiles of 16 rows of a warp.
    groups : int
        Groups of warps with rows of their own: the vectors in shared memory serve them all.
    share : int
        Warps that share a row.
    split : int
        Programs that share a row; beyond one, their parts meet in a workspace.
    stages : int
        Steps of a ring in shared memory; all but one are on their way.
    programs : int
        Of a multiprocessor, resident together: what the stages leave room for.
    """

    rows16: int = 2
    groups: int = 4
    share: int = 1
    split: int = 1
    stages: int = 4
    programs: int = 2

    @property
    def rows(self) -> int:
        """Rows of a program."""
        return 16 * self.rows16 * self.groups

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.share * self.groups

    @property
    def registers(self) -> int:
        """Registers of a thread at most, where `programs` are resident together."""
        return min(255, REGISTERS // (32 * self.warps * self.programs) // 8 * 8)


# measured configurations: vectors at most, rows and width; see README.md
WIDE_CONFIGURATIONS = {
    16: {
        (4096, 4096): WideTiling(1, 2, 8, 1, 3, 1), (14336, 4096): WideTiling(2, 2, 4, 1, 4, 2),
        (28672, 8192): WideTiling(2, 2, 2, 1, 4, 4),
    },
    64: {
        (4096, 4096): WideTiling(2, 2, 2, 2, 4, 2), (14336, 4096): WideTiling(2, 4, 1, 2, 3, 2),
        (28672, 8192): WideTiling(2, 4, 1, 4, 3, 3),
    },
}


def takes(batch: int, bits: int, width: int, group: int) -> bool:
    """Tell whether `multiply_wide` takes a product of one stream: 9 to 64 vectors, and what `stream_of` takes."""
    if not FEWEST <= batch <= MOST or bits not in WIDE_BITS:
        return False
    return stream_of(bits, width, 1, None if group >= width else group) is not None


def wide_tiling_for(rows: int, width: int, batch: int) -> WideTiling:
    """Return the configuration of the nearest shape in logarithms."""
    known = next(shapes for most, shapes in WIDE_CONFIGURATIONS.items() if batch <= most)
    return known[min(known, key=lambda shape: math.log(shape[0] / rows) ** 2 + math.log(shape[1] / width) ** 2)]


def wide_fitted(tiling: WideTiling, stream: Stream, batch: int, grouped: bool) -> WideTiling:
    """Return the tiling with what a shape has work for and shared memory holds: fewer stages, programs, warps, parts.

    Scales of groups need accumulators twice: a warp with 64 columns takes 16 rows then, and registers serve two
    programs of a multiprocessor at most.
    """
    columns = columns_for(batch)
    tiles = -(-stream.elements // TILE)
    rows16 = min(tiling.rows16, 64 // columns) if grouped else tiling.rows16
    programs = min(tiling.programs, 2) if grouped else tiling.programs
    share = min(tiling.share, 1 << (tiles.bit_length() - 1))
    tiling = dataclasses.replace(tiling, rows16=rows16, programs=programs, share=share)
    while (stages := _stages(tiling, stream, columns)) < min(3, tiling.stages):
        if tiling.programs > 1:
            tiling = dataclasses.replace(tiling, programs=tiling.programs - 1)
        elif stages >= 2:
            break
        elif tiling.share > 1:
            tiling = dataclasses.replace(tiling, share=tiling.share // 2)
        else:
            tiling = dataclasses.replace(tiling, groups=tiling.groups // 2)
    steps = -(-tiles // tiling.share)
    each = -(-steps // min(tiling.split, steps))
    return dataclasses.replace(tiling, split=-(-steps // each), stages=min(stages, each + 1))


def _stages(tiling: WideTiling, stream: Stream, columns: int) -> int:
    """Return the stages that shared memory holds, where a program takes no more than its share of a multiprocessor."""
    codes = (3 if stream.bits == 3 else 1) * tiling.rows
    stage = 4 * TILE * tiling.share * (codes + PARTS[stream.bits] // 2 * columns)
    return min(tiling.stages, (MULTIPROCESSOR_BYTES // tiling.programs - RESERVED_BYTES) // stage)


def wide_form(bits: int, form: str) -> str:
    """Return the form that the kernel makes use of: symmetric 2-bit codes are looked up, for half the products."""
    if bits == 1 or (form == "affine" and bits != 3):
        return "affine"
    return form if bits == 4 else "any"


def multiply_wide(out: Tensor, operand: Operand, scales: Tensor, zeros: Tensor | None, group: int,
                  tiling: WideTiling | None = None) -> None:
    """Write x Wᵀ into `out` (batch, rows), contiguous.

    Parameters
    ----------
    out : Tensor
    operand : Operand
        Of a shape that `takes` tells.
    scales : Tensor
        (rows, groups).
    zeros : Tensor or None
        uint8, packed as codes are.
    group : int
        Codes that share a scale.
    tiling : WideTiling or None
        None: `wide_tiling_for`.
    """
    batch, rows = out.shape
    bits, width = operand.bits, operand.x.shape[1]
    grouped = group < width or zeros is not None
    whole = stream_of(bits, width, 1, group if group < width else None)
    assert whole is not None
    chosen = wide_fitted(tiling or wide_tiling_for(rows, width, batch), whole, batch, grouped)
    stream = dataclasses.replace(whole, warps=chosen.share)
    form = wide_form(bits, operand.form)
    summed = grouped and (zeros is not None or form == "affine")
    aligned = operand.codes.data_ptr() % 16 == 0
    codes = operand.codes if aligned else operand.codes.clone()
    table = operand.table.to(torch.float16) if bits == 8 else operand.table
    xp, lut, numbers = _prepared(operand, stream, form, summed)
    peaks, totals, sums = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch :]
    target = out
    if chosen.split > 1:
        target = workspace((chosen.split, batch, rows), torch.float32, out.device, "parts of sums")
    multiply_columns[(-(-rows // chosen.rows), chosen.split)](
        codes.view(torch.int32), xp, lut, table, peaks, totals, sums, scales, scales if zeros is None else zeros,
        target, rows, batch, scales.shape[-1] if grouped else 1, scales.stride(0), xp.stride(1), xp.stride(0), bits,
        stream.elements, stream.run, stream.padded, form, group // CODES[bits] if grouped else 0, zeros is not None,
        chosen.share, chosen.groups, chosen.rows, columns_for(batch), chosen.split, chosen.stages,
        num_warps=chosen.warps, maxnreg=chosen.registers, launch_pdl=aligned)  # codes are read before the wait
    if chosen.split > 1:
        sum_parts[(-(-batch * rows // SUMMED),)](target, out, batch * rows, chosen.split, SUMMED, launch_pdl=True)


def _prepared(operand: Operand, stream: Stream, form: str, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
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
