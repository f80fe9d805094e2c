"""One vector: which products the kernel takes, how they are divided, and configurations as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import torch

from tersor.ops.codebook_linear.shapes.limits import DTYPES, nearest_shape
from tersor.ops.codebook_linear.shapes.one import (
    VectorStream,
    VectorTiling,
    number_bytes,
    vector_fitted,
    vector_rotates,
    vector_takes,
)
from tersor.ops.trellis_linear import shapes as lines

SEGMENT, UNIT = lines.SEGMENT, lines.UNIT  # for device code
FORM = "affine"  # of signs
AGES = 4  # bits of a window that a lane weighs
LONGEST = 128  # bits of a window
MATRICES = 4  # of one launch


@dataclasses.dataclass(frozen=True)
class Tiling(VectorTiling):
    """How a product is divided: rows are of signs.

    Attributes
    ----------
    rounds : int
        Blocks of a program, at most, where segments are long enough.
    """

    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class Division:
    """A product in blocks, each a part of a segment.

    Attributes
    ----------
    tiling : Tiling
        As shared memory holds it.
    parts : int
        Blocks of a segment.
    halo : int
        Rows of signs that a block's windows see before its own; none where it is a whole circle.
    tiles : int
        Of `tiling.rows` rows, of a block.
    numbers : int
        Of a block at most, rounded up to a power of two.
    blocks : int
        Of all segments.
    """

    tiling: Tiling
    parts: int
    halo: int
    tiles: int
    numbers: int
    blocks: int


def refusal(dtype: torch.dtype, found: Sequence[lines.Line], width: int) -> str | None:
    """Return why the kernel does not take a vector with lines of one filter along outputs, or None where it does."""
    if dtype not in DTYPES:
        return f"vectors of {dtype}"
    if not vector_takes(1, FORM, width):
        return f"rows of {width} signs"
    if found[0].memory > LONGEST:
        return f"a window of {found[0].memory} bits"
    return next((reason for line in found if (reason := lines.refusal(line)) is not None), None)


@lru_cache(maxsize=256)
def divided(tiling: Tiling, found: tuple[lines.Line, ...], width: int, dtype: torch.dtype, processors: int, *,
            rotated: bool) -> Division | None:
    """Return how a tiling divides a product on so many multiprocessors, or None where shared memory does not hold it.

    Lines are of one filter. The product is rotated within where `rotated`.
    """
    line = found[0]
    period, step = len(line.shifts), sum(line.shifts)
    sizes = [size for one in found for size in lines.segments(one.length)]
    periods = -(-max(sizes) // period)
    parts = max(1, min(periods, tiling.rounds * tiling.programs * processors // len(sizes)))
    halo = 0 if parts == 1 else line.memory - line.shifts[0]
    each = -(-periods // parts)
    tiles = -(-(each * step + halo) // tiling.rows)
    held = 1 << (tiles - 1).bit_length()  # shares of all warps are kept, then their sums
    stream = VectorStream(1, width, FORM, number_bytes(dtype))
    fit = vector_fitted(tiling, [stream], rotated=rotated, besides=4 * held * tiling.rows * (tiling.warps + 1))
    if fit is None or (rotated and not vector_rotates(width)):
        return None
    stages = min(fit.stages, tiles * stream.steps(fit.warps))
    fitted = dataclasses.replace(fit, stages=stages, early=min(stages, fit.early))
    return Division(fitted, parts, halo, tiles, 1 << (each * period - 1).bit_length(), parts * len(sizes))


# configurations, by rows of signs and width, measured at 2, 2.5, 3 and 4 bits, the widest shape at three of them;
# (28672, 14336) is like its neighbours
CONFIGURATIONS = {(8192, 14336): Tiling(8, 16, 1, 6, 2, 1), (16384, 14336): Tiling(8, 16, 1, 6, 2, 1),
                  (28672, 14336): Tiling(8, 32, 1, 3, 2, 3), (57344, 8192): Tiling(8, 32, 1, 4, 2, 3)}
# the same where the kernel rotates the vector first, measured at 2, 2.5, 3 and 4 bits
ROTATED_CONFIGURATIONS = {(8192, 4096): Tiling(4, 16, 1, 12, 4, 2), (12288, 4096): Tiling(4, 16, 1, 8, 2, 2),
                          (16384, 4096): Tiling(4, 32, 1, 4, 2, 3), (57344, 4096): Tiling(4, 32, 1, 4, 2, 3)}


def tiling_for(found: Sequence[lines.Line], width: int, *, rotated: bool) -> Tiling:
    """Return the configuration that was measured with the nearest shape."""
    measured = ROTATED_CONFIGURATIONS if rotated else CONFIGURATIONS
    return measured[nearest_shape(measured, max(1, sum(line.stream for line in found)), width)]
