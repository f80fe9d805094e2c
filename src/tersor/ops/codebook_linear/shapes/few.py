"""Up to 8 vectors, or 16 of two streams: how `multiply_rows` divides work, and configurations as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tersor.ops.codebook_linear.shapes.limits import CODES, TILE, CodeStream, nearest_shape

COLUMNS = {1: 8, 2: 16}  # vectors that one pass of `multiply_rows` over so many streams of codes serves
NEAR_BYTES = 120_000  # of shared memory for the vectors
SHARED_BYTES = 220_000  # of shared memory for a program


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How `multiply_rows` divides work: a program's `warps` share each of `16 rows16` rows.

    Attributes
    ----------
    rows16, warps : int
    programs : int
        Of a multiprocessor.
    stages : int
        Tiles of a ring in shared memory; all but one are on their way.
    """

    rows16: int
    warps: int
    programs: int = 2
    stages: int = 4

    @property
    def rows(self) -> int:
        """Rows that a program takes at a time."""
        return 16 * self.rows16


# measured configurations of `multiply_rows`: vectors at most, kind, rows and width; see README.md
CONFIGURATIONS = {
    8: {
        "fields": {(4096, 4096): Tiling(1, 4, 32, 3), (14336, 4096): Tiling(2, 2, 32), (4096, 14336): Tiling(1, 8, 2),
                   (28672, 8192): Tiling(2, 4, 32, 3)},
        "table": {(4096, 4096): Tiling(1, 4, 4), (14336, 4096): Tiling(1, 4, 32, 3), (4096, 14336): Tiling(1, 16, 2, 3),
                  (28672, 8192): Tiling(2, 4, 32, 3)},
        "table3": {(4096, 4096): Tiling(1, 4, 7, 3), (14336, 4096): Tiling(1, 4, 32, 3),
                   (4096, 14336): Tiling(1, 4, 2), (28672, 8192): Tiling(1, 4, 7, 3)},
        "groups": {(4096, 4096): Tiling(1, 8, 2, 4), (14336, 4096): Tiling(2, 4, 32, 3),
                   (4096, 14336): Tiling(1, 16, 2, 3), (28672, 8192): Tiling(1, 4, 32, 3)},
        "two": {(4096, 4096): Tiling(2, 4, 3, 6), (14336, 4096): Tiling(1, 4, 32), (4096, 14336): Tiling(1, 4, 32, 3),
                (28672, 8192): Tiling(2, 4, 2)},
    },
    16: {"two": {(4096, 4096): Tiling(2, 4, 2)}},
}


def kind_of(bits: Sequence[int], *, fields: bool, grouped: bool) -> str:
    """Return which configurations suit streams of codes."""
    if len(bits) > 1:
        return "two"
    if grouped:
        return "groups"
    return "table3" if bits[0] == 3 else "fields" if fields else "table"


def tiling_for(kind: str, rows: int, width: int, batch: int) -> Tiling:
    """Return the configuration of the measured shape that is nearest in logarithms; fewer warps for narrow rows."""
    measured = next(kinds[kind] for most, kinds in CONFIGURATIONS.items() if batch <= most)
    tiling = measured[nearest_shape(measured, rows, width)]
    most = 16 if width >= 2048 else 4 if width >= 512 else 2
    return dataclasses.replace(tiling, warps=min(tiling.warps, most))


def fitted(tiling: Tiling, streams: Sequence[CodeStream], near: int) -> Tiling:
    """Return the tiling with as many stages as shared memory holds beside the vectors, at least two."""
    words = sum(3 if stream.bits == 3 else 1 for stream in streams)
    stage = words * 4 * TILE * tiling.rows * tiling.warps
    room = SHARED_BYTES - 2 * near * sum(stream.padded * CODES[stream.bits] for stream in streams)
    return dataclasses.replace(tiling, stages=max(2, min(tiling.stages, room // stage)))


def near_columns(batch: int, streams: Sequence[CodeStream]) -> int:
    """Return the vectors whose numbers are kept in shared memory: one, eight, or none where they do not fit."""
    numbers = sum(stream.padded * CODES[stream.bits] for stream in streams)
    columns = 1 if batch == 1 else 8
    return columns if batch <= 8 and 2 * columns * numbers <= NEAR_BYTES else 0
