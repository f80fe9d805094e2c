"""`x Wᵀ` for product quantization, plain or behind swaps: kernels on CUDA, plain torch elsewhere. See README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.ops.dispatch import take_reference
from tersor.ops.product_linear import reference
from tersor.ops.product_linear.codewords import Codewords as Codewords
from tersor.ops.product_linear.shapes import refusal


def product_linear(x: Tensor, matrix: Codewords) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`, for `x` (*batch, width); sums in float32."""
    return _op(x, matrix.codes, matrix.codebooks, matrix.scale, matrix.offset, matrix.mask, matrix.sizes)


@torch.library.custom_op("tersor::product_linear", mutates_args=())
def _op(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor | None, offset: Tensor | None, mask: Tensor | None,
        sizes: Sequence[int]) -> Tensor:
    return reference.multiply(x, Codewords(codes, codebooks, scale, offset, mask, *sizes))


@_op.register_fake
def _fake(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor | None, offset: Tensor | None,
          mask: Tensor | None, sizes: Sequence[int]) -> Tensor:
    del codes, codebooks, scale, offset, mask
    return torch.empty(*x.shape[:-1], sizes[0], dtype=x.dtype, device=x.device)


@_op.register_kernel("cuda")
def _cuda(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor | None, offset: Tensor | None,
          mask: Tensor | None, sizes: Sequence[int]) -> Tensor:
    matrix = Codewords(codes, codebooks, scale, offset, mask, *sizes)
    if take_reference("product_linear", refusal(matrix, x.shape[-1], x.dtype)):
        return reference.multiply(x, matrix)
    from tersor.ops.product_linear import launch

    return launch.multiply(x, matrix)


@torch.library.custom_op("tersor::product_linear_back", mutates_args=())
def _back(incoming: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor | None, offset: Tensor | None,
          mask: Tensor | None, sizes: Sequence[int], width: int) -> Tensor:
    return reference.gradient(incoming, Codewords(codes, codebooks, scale, offset, mask, *sizes), width)


@_back.register_fake
def _(incoming: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor | None, offset: Tensor | None,
      mask: Tensor | None, sizes: Sequence[int], width: int) -> Tensor:
    del codes, codebooks, scale, offset, mask, sizes
    return torch.empty(*incoming.shape[:-1], width, dtype=incoming.dtype, device=incoming.device)


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001 - torch names no type for it
    del output
    ctx.save_for_backward(*inputs[1:6])
    ctx.width, ctx.sizes = inputs[0].shape[-1], inputs[6]


def _backward(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001 - as above
    return _back(incoming, *ctx.saved_tensors, ctx.sizes, ctx.width), None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_keep)
