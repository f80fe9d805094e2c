"""`x₁ (s a[S])ᵀ + x₂ (s b[T])ᵀ`: products with two-basis codes, both in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.shapes.limits import refusal
from tersor.ops.dispatch import take_reference
from tersor.ops.hadamard import hadamard
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
    if take_reference("sign_linear", _refusal(sizes, (first_x, second_x)), first_x.device):
        return reference.sign_linear(first_x, second_x, first, second, levels, scales, *sizes)
    from tersor.ops.sign_linear import launch

    return launch.sign_linear((first_x, second_x), (first, second), levels, scales, sizes)


def _refusal(sizes: tuple[int, int], vectors: tuple[Tensor, Tensor]) -> str | None:
    return next((found for size, x in zip(sizes, vectors, strict=True)
                 if (found := f"{size} levels" if size & (size - 1) else
                     refusal(x.dtype, size.bit_length() - 1, x.shape[1], x.shape[1]))), None)


@torch.library.custom_op("tersor::sign_linear_back", mutates_args=())
def _back(incoming: Tensor, packed: Tensor, half: Tensor, scales: Tensor, size: int, width: int) -> Tensor:
    return reference.gradient(incoming, packed, half, scales, size, width)


@_back.register_fake
def _(incoming: Tensor, packed: Tensor, half: Tensor, scales: Tensor, size: int, width: int) -> Tensor:
    del packed, half, scales, size
    return torch.empty(incoming.shape[0], width, dtype=torch.float32, device=incoming.device)


def _both_back(ctx, incoming: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001 - torch names no type for it
    first, second, levels, scales = ctx.saved_tensors
    halves = levels[: ctx.sizes[0] // 2], levels[ctx.sizes[0] // 2 :]
    return (_back(incoming, first, halves[0], scales, ctx.sizes[0], ctx.widths[0]),
            _back(incoming, second, halves[1], scales, ctx.sizes[1], ctx.widths[1]))


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001 - as above
    del output
    first_x, second_x, *tensors, one, two = inputs
    ctx.save_for_backward(*tensors)
    ctx.sizes, ctx.widths, ctx.dtypes = (one, two), (first_x.shape[1], second_x.shape[1]), (first_x.dtype,
                                                                                           second_x.dtype)


def _backward(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001 - as above
    first, second = _both_back(ctx, incoming)
    return first.to(ctx.dtypes[0]), second.to(ctx.dtypes[1]), *(None,) * 6


sign_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("tersor::two_basis_linear", mutates_args=())
def two_basis_linear(x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor, first_levels: int,
                     second_levels: int, *, outer: int, inner: int) -> Tensor:
    """Return (batch, rows) in the dtype of `x` (batch, width): `sign_linear` of it rotated once, and that once more.

    Parameters
    ----------
    x, first, second, levels, scales, first_levels, second_levels
        As of `sign_linear`; both bases have the width of `x`.
    outer, inner : int
        Seeds, below `tersor.ops.hadamard.SEEDS`, of rotations of the whole width. The kernel for one vector rotates it
        on the way.
    """
    one = hadamard(x, Rotation(x.shape[1], outer), dtype=torch.float32)
    two = hadamard(one, Rotation(x.shape[1], inner))
    return reference.sign_linear(one, two, first, second, levels, scales, first_levels, second_levels).to(x.dtype)


@two_basis_linear.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor, first_levels: int, second_levels: int,
      *, outer: int, inner: int) -> Tensor:
    del first, second, levels, first_levels, second_levels, outer, inner
    return x.new_empty(x.shape[0], scales.shape[0])


@two_basis_linear.register_kernel("cuda")
def _(x: Tensor, first: Tensor, second: Tensor, levels: Tensor, scales: Tensor, first_levels: int, second_levels: int,
      *, outer: int, inner: int) -> Tensor:
    sizes, turns = (first_levels, second_levels), (Rotation(x.shape[1], outer), Rotation(x.shape[1], inner))
    if take_reference("two_basis_linear", _refusal(sizes, (x, x)), x.device):
        one = hadamard(x, turns[0], dtype=torch.float32)
        two = hadamard(one, turns[1])
        return reference.sign_linear(one, two, first, second, levels, scales, *sizes).to(x.dtype)
    from tersor.ops.sign_linear import launch

    y = launch.rotated_sign_linear(x, (first, second), levels, scales, sizes, turns)
    if y is None:
        one = hadamard(x, turns[0], dtype=x.dtype)
        both = one, hadamard(one, turns[1])
        y = launch.sign_linear(both, (first, second), levels, scales, sizes, dtype=x.dtype)
    return y


def _keep_rotations(ctx, inputs, keyword_only_inputs, output) -> None:  # noqa: ANN001 - as above
    del output
    x, *tensors, one, two = inputs
    ctx.save_for_backward(*tensors)
    ctx.sizes, ctx.widths, ctx.dtype = (one, two), (x.shape[1], x.shape[1]), x.dtype
    ctx.outer, ctx.inner = keyword_only_inputs["outer"], keyword_only_inputs["inner"]


def _backward_rotated(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001 - as above
    first, second = _both_back(ctx, incoming)
    turned = first + hadamard(second, Rotation(ctx.widths[0], ctx.inner), inverse=True)
    return hadamard(turned, Rotation(ctx.widths[0], ctx.outer), inverse=True, dtype=ctx.dtype), *(None,) * 6


two_basis_linear.register_autograd(_backward_rotated, setup_context=_keep_rotations)
