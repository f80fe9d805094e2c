"""Products of one vector, with what stands around them, in one launch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from tersor.ops.codebook_linear.kernels.one import multiply_vector
from tersor.ops.codebook_linear.launch.operand import Around, Operand
from tersor.ops.codebook_linear.shapes.one import (
    VectorTiling,
    vector_fitted,
    vector_rotates,
    vector_takes,
    vector_tiling_for,
)
from tersor.ops.hadamard.signs import signs_on
from tersor.ops.workspace import multiprocessors


def vector_tiling(operands: Sequence[Operand], rows: int, *, rotated: bool) -> VectorTiling | None:
    """Return how the kernel for one vector divides a product with a scale a row, or None where it does not take it."""
    streams = [operand.stream for operand in operands]
    if not all(vector_takes(stream.bits, stream.form, stream.width) for stream in streams):
        return None
    if rotated and not all(vector_rotates(stream.width) for stream in streams):
        return None
    return vector_fitted(vector_tiling_for(streams, rows, rotated=rotated), streams, rotated=rotated)


def multiply_one_into(out: Tensor, operands: Sequence[Operand], scales: Sequence[Tensor], tiling: VectorTiling,
                      around: Around) -> None:
    """Write into `out` (1, rows) the sum over one or two operands of x Wᵀ, with a scale a row, and what is around it.

    There are as many `scales` as matrices of an operand; all but the last have whole tiles of rows.
    """
    rows, two = out.shape[1], len(operands) > 1
    streams, first, last, turns = [], operands[0], operands[-1], around.rotations
    for number, operand in enumerate((first, last)):
        signs = signs_on(turns[number % len(turns)], out.device) if turns else operand.table
        streams += [operand.x, operand.words(), operand.table, signs]
    starts = tuple(itertools.accumulate(one.shape[0] for one in scales[:-1]))
    norm, added = (first.table if one is None else one for one in (around.norm, around.added))
    programs = min(-(-rows // tiling.rows), tiling.programs * multiprocessors(out.device))
    near = [operand.stream.together(tiling.warps, rotated=bool(turns)) for operand in (first, last)]
    multiply_vector[(programs,)](
        *streams, tuple(scales), starts, norm, around.eps, added, out, rows, scales[0].stride(0), first.x.shape[1],
        first.bits, first.form, last.x.shape[1], last.bits if two else 0, last.form, *near,
        first.stream.number, two, bool(turns), around.norm is not None, around.added is not None, around.gated,
        rows % tiling.rows == 0, tiling.warps, tiling.rows, tiling.stages, tiling.early, num_warps=tiling.warps,
        maxnreg=tiling.registers,
        launch_pdl=all(operand.aligned for operand in operands))  # codes are read before the wait
