"""One vector times linear trellis codes along outputs, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch.operand import Around, Operand
from tersor.ops.codebook_linear.shapes.one import VectorStream, number_bytes, vector_rotates
from tersor.ops.codebook_linear.surrounding import normed
from tersor.ops.hadamard import launch as turning
from tersor.ops.hadamard.signs import signs_on
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_product.kernels.product import multiply_filtered
from tersor.ops.trellis_product.shapes.one import FORM, Division, Tiling, divided, refusal, tiling_for
from tersor.ops.workspace import multiprocessors


def joined(x: Tensor, codes: Sequence[Tensor], taps: Tensor, scales: Sequence[Tensor], lines: Sequence[Line],
           around: Around) -> Tensor | None:
    """Return what `one_vector` does; where it takes no norm, of a vector that was normed before."""
    y = one_vector(x, codes, taps, scales, lines, around)
    if y is not None or around.norm is None:
        return y
    known = normed(x, around.norm, around.eps)
    return one_vector(known, codes, taps, scales, lines, Around(around.rotations, added=around.added))


def one_vector(x: Tensor, codes: Sequence[Tensor], taps: Tensor, scales: Sequence[Tensor], lines: Sequence[Line],
               around: Around, tiling: Tiling | None = None) -> Tensor | None:
    """Return (*batch, all lengths) in the dtype of `x`, one vector (*batch, width), by one kernel, or None.

    Codes, scales and lines are of each matrix, of one filter. A vector that the kernel does not rotate is rotated by a
    launch before it, if there is no norm.
    """
    width = x.shape[-1]
    if x.numel() != width or refusal(x.dtype, lines, width) is not None:
        return None
    flat, turn = x.reshape(1, -1).contiguous(), around.rotations[0] if around.rotations else None
    found = None
    if turn is not None and vector_rotates(width):
        found = _divided(flat, lines, tiling, rotated=True)
    if found is None:
        if around.norm is not None:
            return None
        found = _divided(flat, lines, tiling, rotated=False)
        if found is None:
            return None
        flat, turn = flat if turn is None else turning.rotate(flat, turn, False, x.dtype), None
    out = torch.empty(*x.shape[:-1], sum(line.length for line in lines), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        operand = Operand(flat, codes[0], taps, 1, FORM, tuple(codes[1:]))
        _multiply(out, operand, scales, lines, around, turn, found)
    return out


def _divided(x: Tensor, lines: Sequence[Line], tiling: Tiling | None, *, rotated: bool) -> Division | None:
    width = x.shape[1]
    chosen = tiling or tiling_for(lines, width, rotated=rotated)
    return divided(chosen, tuple(lines), width, x.dtype, multiprocessors(x.device), rotated=rotated)


def _multiply(out: Tensor, operand: Operand, scales: Sequence[Tensor], lines: Sequence[Line], around: Around,
              turn: Rotation | None, found: Division) -> None:
    """Launch; the operand's table are the taps."""
    width, number = operand.x.shape[1], number_bytes(operand.x.dtype)
    tiling, line, taps = found.tiling, lines[0], operand.table
    together = VectorStream(1, width, FORM, number).together(tiling.warps, rotated=turn is not None)
    norm, added = (taps if one is None else one for one in (around.norm, around.added))
    signs = taps if turn is None else signs_on(turn, out.device)
    programs = min(found.blocks, tiling.programs * multiprocessors(out.device))
    multiply_filtered[(programs,)](
        operand.x, operand.words(), signs, norm, around.eps, taps, tuple(scales), added, out,
        tuple(one.length for one in lines), width, together, number, turn is not None, around.norm is not None,
        around.added is not None, line.shifts, sum(line.shifts), line.memory, found.parts, found.halo, found.tiles,
        found.numbers, tiling.warps, tiling.rows, tiling.stages, tiling.early, num_warps=tiling.warps,
        maxnreg=tiling.registers, launch_pdl=operand.aligned)  # codes are read before the wait
