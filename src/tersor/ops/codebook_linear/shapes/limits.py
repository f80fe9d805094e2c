"""Which shapes the kernels take, and what a stream of codes is: what all cases share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (1, 2, 3, 4, 8)
MOST_COLUMNS = 64  # vectors beyond which the matrix is decoded first
CODES = {1: 32, 2: 16, 3: 32, 4: 8, 8: 4}  # codes of an element: 32 bits of the stream, 96 of 3-bit codes
PARTS = CODES  # fragments that an element gives
RUNS = {1: (4, 2), 2: (4, 2), 3: (2,), 4: (4, 2), 8: (4, 2)}  # neighbouring elements that a lane loads at once
WIDEST = 1 << 16  # codes of a row: a program reads a whole vector at once
REGISTERS = 65536  # of a multiprocessor
MULTIPROCESSOR_BYTES = 228 * 1024  # of shared memory, for all programs of a multiprocessor
TILE = 16  # elements that a product on the tensor cores takes


@dataclasses.dataclass(frozen=True)
class CodeStream:
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


def stream_of(bits: int, width: int, warps: int, group: int | None = None) -> CodeStream | None:
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
    return CodeStream(bits, width, run, warps)


def nearest_shape(shapes: Iterable[tuple[int, int]], rows: int, width: int) -> tuple[int, int]:
    """Return the shape that is nearest in logarithms."""
    return min(shapes, key=lambda shape: math.log(shape[0] / rows) ** 2 + math.log(shape[1] / width) ** 2)


def columns_for(batch: int) -> int:
    """Return the columns of a program: the batch, padded to a power of two of at least 8."""
    return max(8, 1 << (batch - 1).bit_length())


def refusal(dtype: torch.dtype, bits: int, width: int, group: int) -> str | None:
    """Return why the kernel does not take a shape, or None where it does; see `stream_of`."""
    if dtype not in DTYPES:
        return f"vectors of {dtype}"
    if stream_of(bits, width, 1, None if group >= width else group) is None:
        return f"{bits}-bit codes, width {width}, groups of {group}"
    return None
