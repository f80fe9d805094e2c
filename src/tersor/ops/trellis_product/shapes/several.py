"""Several vectors: which products are taken by counting shared bits, and how they are divided."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch

from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_linear.shapes import refusal as line_refusal

WARPS, AROUND_WARPS = 8, 4  # of a program that counts, and of those before and after
CHUNK = 4096  # numbers of a vector that a program cuts into planes
FILTERED = 128  # numbers that a program filters
STEP_COLUMNS = 1024  # of a step of such a program
BLOCK = 256  # rows of signs of its blocks
STAGES = 3  # of its ring
ENDING = 1.0  # of a step: what a block takes once its signs are counted
ROOM = 227 * 1024 - 4096  # bytes of its shared memory, but for the last page
LEAST, MOST_WIDTH = 128, 1 << 16  # columns: of 16 bytes of signs
MOST_VECTORS, SOME_VECTORS = 64, 32  # that meet signs, of at most so many bits a number, and of more
MANY_BITS = 2
FEW_PLANES, MANY_PLANES = 12, 10  # for at most 8 vectors, and for more


@dataclasses.dataclass(frozen=True)
class Several:
    """How a product of several vectors is divided among programs.

    Attributes
    ----------
    planes : int
        Bits of a number of the vectors.
    eights : int
        Times eight vectors, of a program.
    groups : int
        Of vectors.
    parts, steps : int
        Of the columns; of 1,024 columns, of a part at most.
    programs : int
        That take blocks in turn, of each group and part.
    """

    planes: int
    eights: int
    groups: int
    parts: int
    steps: int
    programs: int

    @property
    def step_bytes(self) -> int:
        """Bytes of the planes that a step meets."""
        return self.eights * self.planes * STEP_COLUMNS

    @property
    def tiles(self) -> int:
        """Of 16 rows, of a warp."""
        return BLOCK // 16 * self.eights // WARPS

    @property
    def vectors(self) -> int:
        """Vectors of all groups, some of them zeros."""
        return 8 * self.eights * self.groups


def refusal(dtype: torch.dtype, line: Line, width: int, batch: int) -> str | None:
    """Return why bits are not counted, or None; codes begin at a multiple of 16 bytes, and vectors are rotated.

    Units are the largest number's of a vector: one that stands out by far would leave few of them to the others.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"vectors of {dtype}"
    if width % LEAST or width > MOST_WIDTH:
        return f"rows of {width} signs"
    if not 1 < batch <= MOST_VECTORS:
        return f"{batch} vectors"
    return line_refusal(line)


def fastest_until(line: Line) -> int:
    """Return up to how many vectors counting bits takes less time than looking windows up, as measured."""
    return MOST_VECTORS if sum(line.shifts) <= MANY_BITS * len(line.shifts) else SOME_VECTORS


@lru_cache(maxsize=256)
def divided(rows: int, width: int, batch: int, processors: int, planes: int | None = None) -> Several:
    """Return how `rows` of signs meet `batch` vectors on so many multiprocessors.

    The longest program decides; what each part more writes is read once more.
    """
    eights = 1 if batch <= 8 else 2
    groups = -(-batch // (8 * eights))
    planes = planes or (FEW_PLANES if eights == 1 else MANY_PLANES)
    every, blocks = -(-width // STEP_COLUMNS), -(-rows // BLOCK)
    most = (ROOM - STAGES * BLOCK * STEP_COLUMNS // 8) // (eights * planes * STEP_COLUMNS)
    best, least = Several(planes, eights, groups, every, 1, 1), float("inf")
    for parts in range(-(-every // most), every + 1):
        steps = -(-every // parts)
        if -(-every // steps) != parts:
            continue
        programs = min(blocks, max(1, processors // (groups * parts)))
        time = -(-blocks // programs) * (steps + ENDING) * eights + parts * (0.5 + rows * batch / 1e6)
        if time < least:
            best, least = Several(planes, eights, groups, parts, steps, programs), time
    return best
