"""`x R Lᵀ` for two dense thin factors: two launches for few vectors on CUDA, plain torch elsewhere. See README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.dispatch import take_reference
from tersor.ops.low_rank_linear import reference
from tersor.ops.low_rank_linear.shapes import refusal


@torch.library.custom_op("tersor::low_rank_linear", mutates_args=())
def low_rank_linear(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return (*batch, out) in the dtype of `x`; sums in float32.

    Parameters
    ----------
    x : Tensor
        (*batch, in).
    left, right : Tensor
        (out, rank) and (in, rank), any float dtypes.
    """
    return reference.multiply(x, left, right)


@low_rank_linear.register_fake
def _fake(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    del right
    return torch.empty(*x.shape[:-1], left.shape[0], dtype=x.dtype, device=x.device)


@low_rank_linear.register_kernel("cuda")
def _cuda(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if take_reference("low_rank_linear", refusal(x.dtype, left.dtype, right.dtype)):
        return reference.multiply(x, left, right)
    from tersor.ops.low_rank_linear import launch

    return launch.multiply(x, left, right)


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001 - torch names no type for it
    del output
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, incoming: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001 - as above
    left, right = ctx.saved_tensors
    return low_rank_linear(incoming, right, left), None, None


low_rank_linear.register_autograd(_backward, setup_context=_keep)
