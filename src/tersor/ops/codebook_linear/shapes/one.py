"""One vector's products: which the kernel takes, how they are divided, and configurations as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch

from tersor.ops.codebook_linear.shapes.limits import (
    BITS,
    CODES,
    MULTIPROCESSOR_BYTES,
    REGISTERS,
    WIDEST,
    nearest_shape,
)

ACROSS = 32  # words of a row that a warp takes at a time, for one vector
PROGRAM_BYTES = 3072  # of shared memory that a program needs besides rings and digits
# by bits, of codes that are met as bit planes: words of a plane that 32 words of codes give (96 of 3-bit codes), and
# bytes of a number whose planes lie together in shared memory, so that a lane's four words do
PLANE_WORDS = {1: 32, 2: 16, 3: 32, 4: 8}
BYTES_TOGETHER = {1: 1, 2: 1, 3: 1, 4: 2}
DIGIT_BYTES = 4  # of shared memory for a number of one vector, as digits
HELD = 64  # numbers of one vector that a lane keeps in registers while the largest is found
# bits and forms of codes that one vector's numbers meet as bit planes, and not as digits
IN_PLANES = frozenset({(4, "symmetric"), (4, "affine")}
                      | {(bits, form) for bits in (1, 2, 3) for form in ("any", "symmetric", "affine")})


def known_form(bits: int, form: str) -> str:
    """Return the form that kernels make use of: one bit is always affine."""
    return "affine" if bits == 1 else form


@dataclasses.dataclass(frozen=True)
class VectorTiling:
    """How a product with one vector is divided: a program's `warps` share each of `rows` rows at a time.

    Attributes
    ----------
    warps, rows : int
    programs : int
        Of a multiprocessor, resident together.
    stages : int
        Steps of a ring in shared memory, all on their way.
    early : int
        Stages that are asked for before the vector is waited for.
    """

    warps: int = 8
    rows: int = 16
    programs: int = 2
    stages: int = 8
    early: int = 1

    @property
    def registers(self) -> int:
        """Return the most registers a thread that so many programs leave one another, in steps of 8."""
        return min(255, REGISTERS // (32 * self.warps * self.programs) // 8 * 8)


def vector_takes(bits: int, form: str, width: int) -> bool:
    """Tell whether the kernel for one vector takes a stream: rows of whole 16 bytes (48 at 3 bits), one scale a row.

    8-bit tables must be affine.
    """
    if bits not in BITS or width % (4 * CODES[bits]) or width > WIDEST:
        return False
    return not (bits == 8 and form != "affine")


def vector_rotates(width: int) -> bool:
    """Tell whether the kernel for one vector rotates it first: powers of two from 512 to 4,096."""
    return width & (width - 1) == 0 and 512 <= width <= 4096


def number_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of a number as planes: an integer of 16 bits for numbers of 16, of 23 for float32."""
    return 3 if dtype == torch.float32 else 2


@dataclasses.dataclass(frozen=True)
class VectorStream:
    """Codes of a row and the numbers of the vector that they meet.

    Attributes
    ----------
    bits, width : int
    form : str
        As of `known_form`.
    number : int
        Bytes of a number as planes.
    """

    bits: int
    width: int
    form: str
    number: int

    @property
    def in_planes(self) -> bool:
        """Whether numbers are met as bit planes."""
        return (self.bits, self.form) in IN_PLANES

    def steps(self, warps: int) -> int:
        """Return the steps of a row."""
        return -(-self.width // CODES[self.bits] // (ACROSS * warps))

    def together(self, warps: int, *, rotated: bool) -> int:
        """Return the steps whose numbers are brought together: all that were rotated, else 32 numbers a lane."""
        steps = self.steps(warps)
        most = ACROSS // PLANE_WORDS[self.bits] if self.in_planes else 1
        return steps if rotated else min(most, 1 << (steps - 1).bit_length())

    def near_bytes(self, warps: int, *, rotated: bool) -> int:
        """Return the shared memory that the numbers need, as digits or bit planes."""
        whole = self.together(warps, rotated=rotated)
        each = DIGIT_BYTES
        if self.in_planes:
            each = -(-self.number // BYTES_TOGETHER[self.bits]) * BYTES_TOGETHER[self.bits]
        return -(-self.steps(warps) // whole) * whole * ACROSS * warps * CODES[self.bits] * each


Tiling = TypeVar("Tiling", bound=VectorTiling)


def vector_fitted(tiling: Tiling, streams: Sequence[VectorStream], *, rotated: bool,
                  besides: int = 0) -> Tiling | None:
    """Return the tiling with what shared memory holds beside the numbers that streams meet, or None.

    There may be fewer stages, then fewer programs; None where one stage does not fit. Where the vector is rotated
    first, all lanes hold words of it, and enough of it for the widest factor. A kernel may need bytes `besides`.
    """
    if rotated:
        factor = 1 << ((max(one.width for one in streams).bit_length() + 1) // 3)
        most = min(one.width // (32 * max(CODES[one.bits], factor)) for one in streams)
        least = max(one.width // (32 * HELD) for one in streams)
        if most < max(1, least):
            return None
        tiling = dataclasses.replace(tiling, warps=max(least, min(tiling.warps, 1 << (most.bit_length() - 1))))
    step = ACROSS * tiling.warps
    near = besides + sum(one.near_bytes(tiling.warps, rotated=rotated) for one in streams)
    near += max(one.width for one in streams) // 2 if rotated else 0  # where rotating needs more than it leaves
    stage = sum(3 if one.bits == 3 else 1 for one in streams) * 4 * step * tiling.rows
    for programs in range(tiling.programs, 0, -1):
        stages = min(tiling.stages, (MULTIPROCESSOR_BYTES // programs - PROGRAM_BYTES - near) // stage)
        if stages >= 1:
            return dataclasses.replace(tiling, stages=stages, programs=programs, early=min(stages, tiling.early))
    return None


# measured configurations for one vector: streams and their bits together, rows and width; see README.md
VECTOR_CONFIGURATIONS = {
    (1, 1): {(28672, 4096): VectorTiling(4, 32, 4, 2), (57344, 8192): VectorTiling(4, 32, 4, 2),
             (8192, 14336): VectorTiling(8, 32, 2, 2), (16384, 14336): VectorTiling(8, 32, 2, 2)},
    (1, 2): {(4096, 4096): VectorTiling(4, 16, 1, 8), (14336, 4096): VectorTiling(4, 16, 4, 3),
             (4096, 14336): VectorTiling(8, 16, 1, 6, 2), (28672, 8192): VectorTiling(8, 16, 3, 2)},
    (1, 3): {(4096, 4096): VectorTiling(4, 16, 1, 3, 3), (14336, 4096): VectorTiling(4, 16, 2, 1),
             (4096, 14336): VectorTiling(8, 16, 1, 2, 2), (28672, 8192): VectorTiling(4, 16, 3, 1)},
    (1, 4): {(4096, 4096): VectorTiling(8, 16, 1, 2), (14336, 4096): VectorTiling(4, 16, 3, 4, 2),
             (4096, 14336): VectorTiling(8, 16, 2, 3, 2), (28672, 8192): VectorTiling(4, 16, 2, 8)},
    (2, 2): {(4096, 4096): VectorTiling(4, 16, 1, 2), (14336, 4096): VectorTiling(4, 32, 1, 2),
             (4096, 14336): VectorTiling(8, 16, 1, 2, 0), (28672, 8192): VectorTiling(8, 32, 1, 2)},
}
# the same where the kernel rotates the vector first; of (4096, 4096) and joined products as they stand in a model
ROTATED_CONFIGURATIONS = {
    (1, 1): {(8192, 4096): VectorTiling(4, 32, 1, 4), (16384, 4096): VectorTiling(4, 32, 1, 4),
             (28672, 4096): VectorTiling(4, 32, 2, 2), (57344, 4096): VectorTiling(4, 32, 2, 2)},
    (1, 2): {(4096, 4096): VectorTiling(4, 16, 1, 5, 2), (6144, 4096): VectorTiling(4, 32, 1, 4),
             (14336, 4096): VectorTiling(4, 32, 2, 4), (28672, 4096): VectorTiling(8, 32, 2, 2)},
    (1, 3): {(4096, 4096): VectorTiling(4, 16, 1, 1), (6144, 4096): VectorTiling(4, 16, 2, 1),
             (14336, 4096): VectorTiling(4, 16, 2, 1), (28672, 4096): VectorTiling(4, 16, 2, 1)},
    (1, 4): {(4096, 4096): VectorTiling(8, 16, 1, 4), (6144, 4096): VectorTiling(8, 16, 1, 3),
             (14336, 4096): VectorTiling(4, 32, 2, 3), (28672, 4096): VectorTiling(8, 16, 2, 3)},
    (2, 2): {(4096, 4096): VectorTiling(4, 16, 1, 2, 0), (14336, 4096): VectorTiling(4, 32, 1, 3)},
}


def vector_tiling_for(streams: Sequence[VectorStream], rows: int, *, rotated: bool) -> VectorTiling:
    """Return the configuration of as many streams that was measured with the nearest bits, then shape."""
    bits, width = sum(stream.bits for stream in streams), max(stream.width for stream in streams)
    known = ROTATED_CONFIGURATIONS if rotated else VECTOR_CONFIGURATIONS
    alike = [key for key in known if key[0] == len(streams)]
    measured = known[min(alike, key=lambda key: abs(key[1] - bits))]
    return measured[nearest_shape(measured, rows, width)]
