"""Seeded rotations of activations: a kernel on the tensor cores on CUDA, plain torch elsewhere. See README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.dispatch import kernels_allowed, take_reference
from tersor.ops.hadamard import reference
from tersor.ops.hadamard.shapes import DTYPES, LANE_VECTORS, refusal
from tersor.ops.tapes import Taped
from tersor.payload.blocks import Few
from tersor.payload.packing import has_numba

SEEDS = 2**63  # an operator's integers have 64 bits; rotations of larger seeds are not traced


def hadamard(x: Tensor, rotation: Rotation, *, inverse: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate `x` (..., n widths) window by window along its last dimension; contiguous, of the same shape.

    Parameters
    ----------
    x : Tensor
        float32, bfloat16 or float16; anything else is rotated in plain torch.
    rotation : Rotation
        Its width divides the last dimension of `x`.
    inverse : bool
        Rotate back.
    dtype : torch.dtype or None
        Of the result; that of `x` by default.
    """
    if rotation.seed >= SEEDS:
        return reference.rotate(x, rotation, inverse, dtype or x.dtype)
    return _op(x, rotation.width, rotation.seed, inverse, dtype or x.dtype)


def ready_rotation(rotation: Rotation, device: torch.device, *, inverse: bool = False) -> Few | None:
    """Return `hadamard` of few vectors, made ready; None where there is none on a device."""
    if rotation.seed >= SEEDS:
        return None
    if device.type == "cuda" and not take_reference("hadamard", refusal(rotation.width), device):
        from tersor.ops.hadamard import launch

        return Taped(lambda x: launch.rotate(x, rotation, inverse, x.dtype))
    if device.type != "cpu" or not has_numba():
        return None
    from tersor.ops.hadamard import lanes

    return lanes.ready(rotation, inverse=inverse)


@torch.library.custom_op("tersor::hadamard", mutates_args=())
def _op(x: Tensor, width: int, seed: int, inverse: bool, dtype: torch.dtype) -> Tensor:
    return reference.rotate(x, Rotation(width, seed), inverse, dtype)


@_op.register_fake
def _fake(x: Tensor, width: int, seed: int, inverse: bool, dtype: torch.dtype) -> Tensor:
    del width, seed, inverse
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@_op.register_kernel("cpu")
def _cpu(x: Tensor, width: int, seed: int, inverse: bool, dtype: torch.dtype) -> Tensor:
    rotation, count = Rotation(width, seed), x.numel() // width
    few = 0 < count <= LANE_VECTORS and x.dtype in DTYPES and not inverse
    if not (few and kernels_allowed() and has_numba()):
        return reference.rotate(x, rotation, inverse, dtype)
    from tersor.ops.hadamard import lanes

    windows = x.detach().to(torch.float32).reshape(-1, width).contiguous()
    return torch.from_numpy(lanes.ready(rotation)(windows.numpy())).reshape(x.shape).to(dtype)


@_op.register_kernel("cuda")
def _cuda(x: Tensor, width: int, seed: int, inverse: bool, dtype: torch.dtype) -> Tensor:
    rotation = Rotation(width, seed)
    if take_reference("hadamard", refusal(width, x.dtype, dtype), x.device):
        return reference.rotate(x, rotation, inverse, dtype)
    from tersor.ops.hadamard import launch

    return launch.rotate(x, rotation, inverse, dtype)


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001 - torch names no type for it
    del output
    ctx.x_dtype, (_, ctx.width, ctx.seed, ctx.inverse, _) = inputs[0].dtype, inputs


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN001 - as above
    return _op(gradient, ctx.width, ctx.seed, not ctx.inverse, ctx.x_dtype), None, None, None, None


_op.register_autograd(_backward, setup_context=_keep)
