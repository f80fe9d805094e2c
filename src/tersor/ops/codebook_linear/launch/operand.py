"""What products are given: vectors with the codes that they meet, and what stands around a product."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.shapes.one import VectorStream, number_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """Vectors and the codes that they meet.

    Attributes
    ----------
    x : Tensor
        (batch, width), rows contiguous.
    codes : Tensor
        uint8, packed.
    table : Tensor
        (2**bits,); of two operands the upper half of each, whose lower half is its mirror image.
    bits : int
    form : str
        `"any"`; `"symmetric"`, where codes c and 2**bits - 1 - c stand for opposite numbers; `"affine"`, where codes
        stand for evenly spaced numbers. What is more special is faster.
    others : tuple of Tensor
        Codes of matrices whose rows follow, for `multiply_one_into`.
    """

    x: Tensor
    codes: Tensor
    table: Tensor
    bits: int
    form: str = "symmetric"
    others: tuple[Tensor, ...] = ()

    @property
    def fields(self) -> bool:
        """Whether the kernel multiplies by the bits as they stand, and by levels later."""
        return self.bits != 3 and (self.form == "affine" or (self.form == "symmetric" and self.bits <= 2))

    @property
    def few_form(self) -> str:
        """The form that kernels for several vectors make use of: they look 3-bit codes up."""
        return "any" if self.bits == 3 else self.form

    @property
    def aligned(self) -> bool:
        """Whether kernels read the codes where they are: then a kernel may read them before the one before it ends."""
        return all(_aligned(codes) for codes in (self.codes, *self.others))

    @property
    def stream(self) -> VectorStream:
        """What one vector meets, and how."""
        return VectorStream(self.bits, self.x.shape[1], self.form, number_bytes(self.x.dtype))

    def words(self) -> tuple[Tensor, ...]:
        """Return the codes of each matrix as int32, a copy where they are not aligned to 16 bytes."""
        return tuple((codes if _aligned(codes) else codes.clone()).view(torch.int32)
                     for codes in (self.codes, *self.others))


@dataclasses.dataclass(frozen=True, eq=False)
class Around:
    """What the kernel for one vector does besides the product.

    Attributes
    ----------
    rotations : sequence of Rotation
        One an operand, or none. The first operand's vector is rotated by the first; the second operand's vector is
        that, rotated by the second.
    norm : Tensor or None
        (width,): the vector is brought to a root mean square of 1 and multiplied by this before it is rotated. With a
        rotation and one operand only.
    eps : float
        Added to the mean square.
    added : Tensor or None
        (rows,), contiguous: added to the product.
    gated : bool
        Whether the product is the second of two matrices', times the first's through `silu`. With one operand only.
    """

    rotations: Sequence[Rotation] = ()
    norm: Tensor | None = None
    eps: float = 0.0
    added: Tensor | None = None
    gated: bool = False


def _aligned(codes: Tensor) -> bool:
    return codes.data_ptr() % 16 == 0
