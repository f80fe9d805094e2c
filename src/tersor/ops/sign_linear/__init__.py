"""`x₁ (s a[S])ᵀ + x₂ (s b[T])ᵀ`: products with two-basis codes, both in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.codebook_linear.shapes import refusal
from tersor.ops.dispatch import take_reference
from tersor.ops.sign_linear import reference


@torch.library.custom_op("tersor::sign_linear", mutates_args=())
def sign_linear(first_x: Tensor, second_x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor,
                first_levels: int, second_levels: int) -> Tensor:
    """Return (batch, rows), float32.

    Parameters
    ----------
    first_x, second_x : Tensor
        (batch, width) of each basis; the second's width may be less, where part of it carries no codes.
    first, second : Tensor
        uint8, 1-D: packed codes of `first_levels` and `second_levels` levels, row after row.
    levels : Tensor
        The positive halves of the two symmetric alphabets, one after the other; an odd alphabet holds 0 besides.
    scales : Tensor
        (rows,), of any stride.
    """
    return reference.sign_linear(first_x, second_x, first, second, levels, scales, first_levels, second_levels)


@sign_linear.register_fake
def _(first_x: Tensor, second_x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor,
      first_levels: int, second_levels: int) -> Tensor:
    del second_x, first, second, levels, first_levels, second_levels
    return first_x.new_empty(first_x.shape[0], scales.shape[0], dtype=torch.float32)


@sign_linear.register_kernel("cuda")
def _(first_x: Tensor, second_x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor,
      first_levels: int, second_levels: int) -> Tensor:
    sizes = first_levels, second_levels
    reason = next((found for size, x in zip(sizes, (first_x, second_x), strict=True)
                   if (found := f"{size} levels" if size & (size - 1) else
                       refusal(x.dtype, size.bit_length() - 1, x.shape[1], x.shape[1]))), None)
    if take_reference("sign_linear", reason):
        return reference.sign_linear(first_x, second_x, first, second, levels, scales, *sizes)
    from tersor.ops.sign_linear import triton

    return triton.sign_linear(first_x, second_x, first, second, levels, scales, *sizes)
