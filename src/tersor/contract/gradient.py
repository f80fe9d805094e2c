"""Gradients of products by their vectors: `y = x Wᵀ` is linear, so its gradient is a product with the transpose.

Nothing of the forward pass is kept but the payload, and the transpose is decoded by blocks of rows: a training step
takes no more memory than inference does. Gradients by the payload do not exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tersor.contract.codec import Encoded


def recorded(x: Tensor) -> bool:
    """Tell whether a product with `x` must be recorded here; `torch.compile` records the operations that it traces."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def product(encoded: Encoded, x: Tensor, *, transposed: bool = False) -> Tensor:
    """Return `x Wᵀ`, or `x W` where transposed, recorded; its gradient is the other of the two, to any order."""
    return _Product.apply(x, encoded, transposed)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """A product with an encoded matrix."""

    @staticmethod
    def forward(x: Tensor, encoded: Encoded, transposed: bool) -> Tensor:
        """Multiply without a record of what happens inside."""
        multiply = encoded.codec.matmul_transposed if transposed else encoded.codec.matmul
        return multiply(encoded, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the matrix, encoded."""
        del output
        _, ctx.encoded, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None, None]:
        """Multiply by the other of W and its transpose."""
        return product(ctx.encoded, incoming[0], transposed=not ctx.transposed), None, None
