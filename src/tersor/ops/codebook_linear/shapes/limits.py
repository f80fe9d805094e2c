"""Which shapes the kernels take, how they lay codes out on the chip, and configurations as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (1, 2, 3, 4, 8)
COLUMNS = {1: 8, 2: 16}  # vectors that one pass of `multiply_rows` over so many streams of codes serves
FEWEST_WIDE = 9  # vectors of one stream that `multiply_wide` takes, up to the most
MOST_COLUMNS = 64  # vectors beyond which the matrix is decoded first
CODES = {1: 32, 2: 16, 3: 32, 4: 8, 8: 4}  # codes of an element: 32 bits of the stream, 96 of 3-bit codes
PARTS = CODES  # fragments that an element gives
RUNS = {1: (4, 2), 2: (4, 2), 3: (2,), 4: (4, 2), 8: (4, 2)}  # neighbouring elements that a lane loads at once
WIDEST = 1 << 16  # codes of a row: a program reads a whole vector at once
NEAR_BYTES = 120_000  # of shared memory for the vectors
SHARED_BYTES = 220_000  # of shared memory for a program
REGISTERS = 65536  # of a multiprocessor
MULTIPROCESSOR_BYTES = 228 * 1024  # of shared memory, for all programs of a multiprocessor
RESERVED_BYTES = 1024  # of each program's shared memory that is the driver's
ACROSS = 32  # words of a row that a warp takes at a time, for one vector
TILE = 16  # elements that a product on the tensor cores takes


@dataclasses.dataclass(frozen=True)
class Stream:
    """How the kernel walks over the codes of a row.

    Attributes
    ----------
    bits : int
    width : int
        Codes of a row.
    run : int
        Neighbouring elements that a lane loads at once.
    warps : int
        Warps that share a row.
    """

    bits: int
    width: int
    run: int
    warps: int

    @property
    def elements(self) -> int:
        """Elements of a row."""
        return self.width // CODES[self.bits]

    @property
    def step(self) -> int:
        """Elements that all warps take at a time, a tile each."""
        return TILE * self.warps

    @property
    def padded(self) -> int:
        """Elements of a row with the zeros that fill the last step."""
        return -(-self.elements // self.step) * self.step

    @property
    def unit(self) -> int:
        """Codes of a tile."""
        return TILE * CODES[self.bits]


def stream_of(bits: int, width: int, warps: int, group: int | None = None) -> Stream | None:
    """Return how to walk over rows of `width` codes in groups of `group`, or None where the kernel does not take them.

    The condition: 1, 2, 3, 4 or 8 bits; rows of at most 65,536 codes, of whole pairs of elements (64 bits; 192 of 3-bit
    codes); and groups, where a row has several, of whole tiles: multiples of 128 codes at 4 bits, 256 at 2 bits, 64 at
    8 bits, 512 at 1 and 3.
    """
    if bits not in BITS or width % CODES[bits] or width > WIDEST:
        return None
    elements = width // CODES[bits]
    run = next((run for run in RUNS[bits] if elements % run == 0), None)
    if run is None or (group is not None and group % (TILE * CODES[bits])):
        return None
    return Stream(bits, width, run, warps)


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


def nearest(shapes: Iterable[tuple[int, int]], rows: int, width: int) -> tuple[int, int]:
    """Return the shape that is nearest in logarithms."""
    return min(shapes, key=lambda shape: math.log(shape[0] / rows) ** 2 + math.log(shape[1] / width) ** 2)


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
    tiling = measured[nearest(measured, rows, width)]
    most = 16 if width >= 2048 else 4 if width >= 512 else 2
    return dataclasses.replace(tiling, warps=min(tiling.warps, most))


def fitted(tiling: Tiling, streams: Sequence[Stream], near: int) -> Tiling:
    """Return the tiling with as many stages as shared memory holds beside the vectors, at least two."""
    words = sum(3 if stream.bits == 3 else 1 for stream in streams)
    stage = words * 4 * TILE * tiling.rows * tiling.warps
    room = SHARED_BYTES - 2 * near * sum(stream.padded * CODES[stream.bits] for stream in streams)
    return dataclasses.replace(tiling, stages=max(2, min(tiling.stages, room // stage)))


def near_columns(batch: int, streams: Sequence[Stream]) -> int:
    """Return the vectors whose numbers are kept in shared memory: one, eight, or none where they do not fit."""
    numbers = sum(stream.padded * CODES[stream.bits] for stream in streams)
    columns = 1 if batch == 1 else 8
    return columns if batch <= 8 and 2 * columns * numbers <= NEAR_BYTES else 0


def columns_for(batch: int) -> int:
    """Return the columns of a program: the batch, padded to a power of two of at least 8."""
    return max(8, 1 << (batch - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class WideTiling:
    """How `multiply_wide` divides work: a program takes `16 rows16 groups` rows and one of `split` parts of each row.

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


# measured configurations of `multiply_wide`: vectors at most, rows and width; see README.md
WIDE_CONFIGURATIONS = {
    16: {
        (4096, 4096): WideTiling(1, 2, 8, 1, 3, 1), (14336, 4096): WideTiling(2, 2, 4, 1, 4, 2),
        (28672, 8192): WideTiling(2, 2, 2, 1, 4, 4),
    },
    64: {
        (4096, 4096): WideTiling(2, 4, 1, 8, 3, 2), (14336, 4096): WideTiling(2, 4, 1, 2, 3, 2),
        (28672, 8192): WideTiling(2, 4, 1, 4, 3, 3),
    },
}


def wide_takes(batch: int, bits: int, width: int, group: int) -> bool:
    """Tell whether `multiply_wide` takes a product of one stream: 9 to 64 vectors, and what `stream_of` takes."""
    known = stream_of(bits, width, 1, None if group >= width else group)
    return known is not None and FEWEST_WIDE <= batch <= MOST_COLUMNS


def wide_tiling_for(rows: int, width: int, batch: int) -> WideTiling:
    """Return the configuration of the measured shape that is nearest."""
    known = next(shapes for most, shapes in WIDE_CONFIGURATIONS.items() if batch <= most)
    return known[nearest(known, rows, width)]


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
    while (stages := _wide_stages(tiling, stream, columns)) < min(3, tiling.stages):
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


def _wide_stages(tiling: WideTiling, stream: Stream, columns: int) -> int:
    """Return the stages that shared memory holds, where a program takes no more than its share of a multiprocessor."""
    codes = (3 if stream.bits == 3 else 1) * tiling.rows
    stage = 4 * TILE * tiling.share * (codes + PARTS[stream.bits] // 2 * columns)
    return min(tiling.stages, (MULTIPROCESSOR_BYTES // tiling.programs - RESERVED_BYTES) // stage)


def refusal(dtype: torch.dtype, bits: int, width: int, group: int) -> str | None:
    """Return why the kernel does not take a shape, or None where it does; see `stream_of`."""
    if dtype not in DTYPES:
        return f"vectors of {dtype}"
    if stream_of(bits, width, 1, None if group >= width else group) is None:
        return f"{bits}-bit codes, width {width}, groups of {group}"
    return None
