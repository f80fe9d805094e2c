"""Several vectors times linear trellis codes along outputs: bit planes, counts of shared bits, filters."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tersor.ops.trellis_linear.shapes import UNIT, Line, segments
from tersor.ops.trellis_product.kernels import around, several_ptx
from tersor.ops.trellis_product.kernels.several import count_several
from tersor.ops.trellis_product.shapes.several import (
    AROUND_WARPS,
    BLOCK,
    CHUNK,
    FILTERED,
    STAGES,
    STEP_COLUMNS,
    WARPS,
    Several,
    divided,
)
from tersor.ops.workspace import multiprocessors, workspace


def several_vectors(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, line: Line,
                    how: Several | None = None) -> Tensor:
    """Return (batch, length) in the dtype of `x`, (batch, width), where `refusal` is None.

    Numbers of a vector are rounded to multiples of its largest over 2^(planes - 1) - 1.
    """
    batch, width = x.shape
    how = how or divided(line.stream, width, batch, multiprocessors(x.device))
    every, chunks, device = -(-width // STEP_COLUMNS), -(-width // CHUNK), x.device
    planes = workspace((how.groups * every * how.step_bytes // 4,), torch.int32, device, "bit planes")
    units = workspace((how.vectors,), torch.float32, device, "units")
    sums = workspace((how.vectors, chunks), torch.int32, device, "sums of vectors")
    counts = workspace((how.parts, batch, line.stream), torch.int32, device, "counts")
    out = torch.empty(batch, line.length, dtype=x.dtype, device=device)
    with torch.cuda.device(device):
        around.cut[(how.vectors, chunks)](
            x, planes, units, sums, width, x.stride(0), batch, every, chunks, how.planes, how.eights,
            num_warps=AROUND_WARPS, launch_pdl=True)
        count_several[(how.programs, how.groups * how.parts)](
            codes, planes, counts, line.stream, batch, width // 8, -(-line.stream // BLOCK), how.steps, every,
            *_texts(how.planes, how.eights, how.tiles), how.parts, how.planes, how.eights, how.tiles, STAGES, how.steps,
            num_warps=WARPS, maxnreg=255, launch_pdl=True)
        around.filter_counts[(-(-line.length // FILTERED), batch)](
            counts, units, sums, taps, scales, out, line.length, line.stream, batch, chunks,
            max(1, line.length // UNIT), len(segments(line.length)), UNIT, line.shifts, sum(line.shifts), line.memory,
            how.parts, FILTERED, 1 << (line.memory - 1).bit_length(), num_warps=AROUND_WARPS, launch_pdl=True)
    return out


@lru_cache(maxsize=16)
def _texts(planes: int, eights: int, tiles: int) -> tuple[str, str, str]:
    """Return what the kernel is told in PTX."""
    return several_ptx.counted(planes, eights, tiles), several_ptx.brought(), several_ptx.awaited()
