"""Which kernel multiplies: by the number of vectors, and by what is known of the codes. See README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.ops.codebook_linear.launch.decoded import by_decoding
from tersor.ops.codebook_linear.launch.few import multiply_few_into
from tersor.ops.codebook_linear.launch.many import multiply_many_into
from tersor.ops.codebook_linear.launch.one import multiply_one_into, vector_tiling
from tersor.ops.codebook_linear.launch.operand import Around, Operand
from tersor.ops.codebook_linear.shapes.few import COLUMNS, Tiling
from tersor.ops.codebook_linear.shapes.limits import MOST_COLUMNS
from tersor.ops.codebook_linear.shapes.many import many_takes
from tersor.ops.codebook_linear.shapes.one import VectorTiling, known_form


def codebook_linear(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
                    group: int, form: str) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`; arguments as of the op."""
    width, rows = x.shape[-1], scales.shape[0]
    flat = x.reshape(-1, width)
    operand = Operand(flat if flat.stride(-1) == 1 else flat.contiguous(), codes, table, bits, known_form(bits, form))
    with torch.cuda.device(x.device):
        if decodes([operand], scales, zeros):
            out = by_decoding(operand, scales, zeros, group)
        else:
            out = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
            multiply_into(out, [operand], scales, zeros, group)
    return out.reshape(*x.shape[:-1], rows)


def decodes(operands: Sequence[Operand], scales: Tensor, zeros: Tensor | None) -> bool:
    """Tell whether rows are decoded for products.

    They are for many vectors; and for those of float32, unless the kernel for one vector takes it: those for few round
    numbers and levels to half precision.
    """
    batch, rows = len(operands[0].x), scales.shape[0]
    if batch > MOST_COLUMNS or operands[0].x.dtype != torch.float32:
        return batch > MOST_COLUMNS
    return batch > 1 or _alone(operands, scales, zeros, rows) is None


def _alone(operands: Sequence[Operand], scales: Tensor, zeros: Tensor | None, rows: int) -> VectorTiling | None:
    """Return how the kernel for one vector divides a product, or None where it does not take it."""
    return vector_tiling(operands, rows, rotated=False) if zeros is None and scales.numel() == rows else None


def one_vector_linear(x: Tensor, codes: Sequence[Tensor], table: Tensor, scales: Sequence[Tensor], bits: int,
                      form: str, around: Around) -> Tensor | None:
    """Return products of one vector with matrices of one codebook, one after another, by one kernel, or None.

    The conditions: one vector, a scale a row, matrices of whole tiles of rows (all but the last, which has them if it
    is gated), a width that the kernel rotates if it is to.
    """
    counts, first = [one.shape[0] for one in scales], scales[0]
    if x.numel() != x.shape[-1] or any(one.numel() != one.shape[0] or one.stride(0) != first.stride(0)
                                       or one.dtype != first.dtype for one in scales):
        return None
    operand = Operand(x.reshape(1, -1).contiguous(), codes[0], table, bits, known_form(bits, form), tuple(codes[1:]))
    tiling = vector_tiling([operand], sum(counts), rotated=bool(around.rotations))
    if tiling is None or any(rows % tiling.rows for rows in (counts if around.gated else counts[:-1])):
        return None
    out = torch.empty(*x.shape[:-1], counts[0] if around.gated else sum(counts), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        multiply_one_into(out.view(1, -1), [operand], scales, tiling, around)
    return out


def multiply_into(out: Tensor, operands: Sequence[Operand], scales: Tensor, zeros: Tensor | None, group: int,
                  tiling: Tiling | None = None) -> None:
    """Write into `out` (batch, rows) the sum over one or two operands of x Wᵀ; a scale a row where there are two."""
    chosen = _alone(operands, scales, zeros, out.shape[1]) if tiling is None and len(out) == 1 else None
    if chosen is not None:
        multiply_one_into(out, operands, [scales], chosen, Around())
        return
    if tiling is None and len(operands) == 1 and many_takes(len(out), operands[0].bits, operands[0].x.shape[1], group):
        multiply_many_into(out, operands[0], scales, zeros, group)
        return
    step = COLUMNS[len(operands)]
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        near = [dataclasses.replace(operand, x=operand.x[part]) for operand in operands]
        multiply_few_into(out[part], near, scales, zeros, group, tiling)
