"""9 to 64 vectors: how `multiply_columns` divides work, and configurations as data."""

from __future__ import annotations

import dataclasses

from tersor.ops.codebook_linear.shapes.limits import (
    MOST_COLUMNS,
    MULTIPROCESSOR_BYTES,
    PARTS,
    REGISTERS,
    TILE,
    CodeStream,
    columns_for,
    nearest_shape,
    stream_of,
)

FEWEST_MANY = 9  # vectors of one stream that `multiply_many_into` takes, up to the most
RESERVED_BYTES = 1024  # of each program's shared memory that is the driver's


@dataclasses.dataclass(frozen=True)
class ManyTiling:
    """How `multiply_columns` divides work.

    A program takes `16 rows16 row_groups` rows and one of `split` parts of each row.

    Attributes
    ----------
    rows16 : int
        Tiles of 16 rows of a warp.
    row_groups : int
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
    row_groups: int = 4
    share: int = 1
    split: int = 1
    stages: int = 4
    programs: int = 2

    @property
    def rows(self) -> int:
        """Rows of a program."""
        return 16 * self.rows16 * self.row_groups

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.share * self.row_groups

    @property
    def registers(self) -> int:
        """Registers of a thread at most, where `programs` are resident together."""
        return min(255, REGISTERS // (32 * self.warps * self.programs) // 8 * 8)


# measured configurations of `multiply_many_into`: vectors at most, rows and width; see README.md
MANY_CONFIGURATIONS = {
    16: {
        (4096, 4096): ManyTiling(1, 2, 8, 1, 3, 1), (14336, 4096): ManyTiling(2, 2, 4, 1, 4, 2),
        (28672, 8192): ManyTiling(2, 2, 2, 1, 4, 4),
    },
    64: {
        (4096, 4096): ManyTiling(2, 4, 1, 8, 3, 2), (14336, 4096): ManyTiling(2, 4, 1, 2, 3, 2),
        (28672, 8192): ManyTiling(2, 4, 1, 4, 3, 3),
    },
}


def many_takes(batch: int, bits: int, width: int, group: int) -> bool:
    """Tell whether `multiply_many_into` takes a product of one stream: 9 to 64 vectors, and what `stream_of` takes."""
    known = stream_of(bits, width, 1, None if group >= width else group)
    return known is not None and FEWEST_MANY <= batch <= MOST_COLUMNS


def many_tiling_for(rows: int, width: int, batch: int) -> ManyTiling:
    """Return the configuration of the measured shape that is nearest."""
    known = next(shapes for most, shapes in MANY_CONFIGURATIONS.items() if batch <= most)
    return known[nearest_shape(known, rows, width)]


def many_fitted(tiling: ManyTiling, stream: CodeStream, batch: int, grouped: bool) -> ManyTiling:
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
            tiling = dataclasses.replace(tiling, row_groups=tiling.row_groups // 2)
    steps = -(-tiles // tiling.share)
    each = -(-steps // min(tiling.split, steps))
    return dataclasses.replace(tiling, split=-(-steps // each), stages=min(stages, each + 1))


def _stages(tiling: ManyTiling, stream: CodeStream, columns: int) -> int:
    """Return the stages that shared memory holds, where a program takes no more than its share of a multiprocessor."""
    codes = (3 if stream.bits == 3 else 1) * tiling.rows
    stage = 4 * TILE * tiling.share * (codes + PARTS[stream.bits] // 2 * columns)
    return min(tiling.stages, (MULTIPROCESSOR_BYTES // tiling.programs - RESERVED_BYTES) // stage)
