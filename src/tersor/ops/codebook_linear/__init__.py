"""`x Wᵀ` for packed scalar codes: W[r, k] = scale[r, group] (table[code[r, k]] - zero[r, group])."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.codebook_linear import reference
from tersor.ops.codebook_linear.shapes import refusal
from tersor.ops.dispatch import take_reference
from tersor.ops.hadamard import hadamard
from tersor.rotation import Rotation


@torch.library.custom_op("tersor::codebook_linear", mutates_args=())
def codebook_linear(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
                    group: int, form: str = "any", *, rotation: int | None = None) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`, for `x` (*batch, width).

    Parameters
    ----------
    x : Tensor
        float32, bfloat16 or float16.
    codes : Tensor
        uint8, 1-D: `rows * width` codes of `bits` bits, packed little-endian, row after row.
    table : Tensor
        float32 (2**bits,): what a code stands for.
    scales : Tensor
        (rows, groups), any float dtype.
    zeros : Tensor or None
        uint8, 1-D: `rows * groups` zero points of `bits` bits, packed like codes.
    group : int
        Codes of a group; `width` for a scale a row.
    form : str
        `"any"`; `"symmetric"`, where codes c and 2**bits - 1 - c stand for opposite numbers; `"affine"`, where codes
        stand for evenly spaced numbers. Says nothing new, but kernels are faster for what is more special.
    rotation : int or None
        Seed, below `tersor.ops.hadamard.SEEDS`, of a rotation of the whole width (`tersor.rotation`) that `x` goes
        through first; the kernel for one vector does it on the way.
    """
    return reference.codebook_linear(_rotated(x, rotation), codes, table, scales, zeros, bits, group).to(x.dtype)


def _rotated(x: Tensor, rotation: int | None) -> Tensor:
    return x if rotation is None else hadamard(x, Rotation(x.shape[-1], rotation), dtype=torch.float32)


@codebook_linear.register_fake
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int,
      form: str = "any", *, rotation: int | None = None) -> Tensor:
    del codes, table, zeros, bits, group, form, rotation
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@codebook_linear.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int,
      form: str = "any", *, rotation: int | None = None) -> Tensor:
    if take_reference("codebook_linear", refusal(x.dtype, bits, x.shape[-1], group), x.device):
        return reference.codebook_linear(_rotated(x, rotation), codes, table, scales, zeros, bits, group).to(x.dtype)
    from tersor.ops.codebook_linear import triton

    if rotation is not None:
        turn = Rotation(x.shape[-1], rotation)
        if (y := triton.rotated_linear(x, codes, table, scales, zeros, bits, form, turn)) is not None:
            return y
        x = hadamard(x, turn)
    return triton.codebook_linear(x, codes, table, scales, zeros, bits, group, form)
