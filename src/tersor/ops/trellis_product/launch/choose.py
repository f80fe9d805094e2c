"""Products with linear trellis codes along outputs on CUDA: which kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.constants import constant
from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch import choose
from tersor.ops.codebook_linear.launch.operand import Around
from tersor.ops.hadamard import launch as turning
from tersor.ops.trellis_linear import launch as filtering
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_product.launch.one import one_vector
from tersor.ops.trellis_product.launch.several import several_vectors
from tersor.ops.trellis_product.shapes.one import FORM
from tersor.ops.trellis_product.shapes.several import refusal


def product(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, line: Line, turn: Rotation | None, *,
            turned: bool) -> Tensor:
    """Return (*batch, length) in the dtype of `x` (*batch, width); `turned`: vectors are rotated, here or before."""
    around = Around(() if turn is None else (turn,))
    y = one_vector(x, [codes], taps, [scales], [line], around)
    if y is not None:
        return y
    width = x.shape[-1]
    if not turned or codes.data_ptr() % 16 or refusal(x.dtype, line, width, x.numel() // width) is not None:
        return in_two(x, codes, taps, scales, line, around)
    own = x if turn is None else turning.rotate(x, turn, False, x.dtype)
    made = several_vectors(own.reshape(-1, width).contiguous(), codes, taps, scales, line)
    return made.reshape(*x.shape[:-1], line.length)


def in_two(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, line: Line, around: Around) -> Tensor:
    """Return the product of signs, filtered by a second launch: of any number of vectors."""
    width, (table, ones) = x.shape[-1], _signs(line.stream, x.device)
    y = choose.one_vector_linear(x, [codes], table, [ones], 1, FORM, around)
    if y is None:
        turned = turning.rotate(x, around.rotations[0], False, x.dtype) if around.rotations else x
        y = choose.codebook_linear(turned, codes, table, ones, None, 1, width, FORM)
    made = filtering.numbers(y.reshape(-1, line.stream), taps, scales, line, x.dtype)
    return made.reshape(*x.shape[:-1], line.length)


@constant
def _signs(stream: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what a bit stands for, and the scales of streams, which are ones: the filter scales."""
    table = torch.tensor([-1.0, 1.0], dtype=torch.float32, device=device)
    return table, torch.ones(stream, 1, dtype=torch.bfloat16, device=device)
