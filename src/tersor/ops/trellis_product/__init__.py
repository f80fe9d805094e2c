"""Few vectors times linear trellis codes along outputs: one vector meets signs and filter in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.shapes.limits import refusal as signs_refusal
from tersor.ops.dispatch import take_reference
from tersor.ops.hadamard import hadamard
from tersor.ops.hadamard.shapes import refusal as rotation_refusal
from tersor.ops.tapes import Taped
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_linear.shapes import refusal as line_refusal
from tersor.ops.trellis_product import reference
from tersor.payload.blocks import Few


@torch.library.custom_op("tersor::trellis_product", mutates_args=())
def trellis_product(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *,
                    rotation: int | None = None) -> Tensor:
    """Return (*batch, length) in the dtype of `x`, (*batch, width).

    Parameters
    ----------
    codes : Tensor
        uint8, packed bits of the streams, (stream, width).
    taps : Tensor
        float32 (period, memory): the newest bit's first.
    scales : Tensor
        (length,), any float dtype.
    shifts : sequence of int
        New bits a number, by phase.
    rotation : int or None
        As of `codebook_linear`.
    """
    return _plain(x, codes, taps, scales, shifts, rotation)


@trellis_product.register_fake
def _(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *,
      rotation: int | None = None) -> Tensor:
    del codes, taps, shifts, rotation
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@trellis_product.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *,
      rotation: int | None = None) -> Tensor:
    line, turn = Line(scales.shape[0], tuple(shifts), taps.shape[1]), _turn(x.shape[-1], rotation)
    if not x.numel() or take_reference("trellis_product", _refusal(line, x.dtype, x.shape[-1], turn), x.device):
        return _plain(x, codes, taps, scales, shifts, rotation)
    from tersor.ops.trellis_product import launch

    return launch.product(x, codes, taps, scales.contiguous(), line, turn)


def ready_product(codes: Tensor, taps: Tensor, scales: Tensor, line: Line, width: int, *,
                  rotation: int | None = None) -> Few | None:
    """Return `trellis_product` of few vectors, made ready; None where there are no kernels."""
    turn = _turn(width, rotation)
    reason = _refusal(line, torch.float32, width, turn)
    if not codes.is_cuda or not line.length or take_reference("trellis_product", reason, codes.device):
        return None
    from tersor.ops.trellis_product import launch

    return Taped(lambda x: launch.product(x, codes, taps, scales, line, turn))


def _turn(width: int, seed: int | None) -> Rotation | None:
    return None if seed is None else Rotation(width, seed)


def _refusal(line: Line, dtype: torch.dtype, width: int, turn: Rotation | None) -> str | None:
    """Return why no kernels take a product, or None: also the two of many launches must."""
    turned = None if turn is None else rotation_refusal(width)
    return signs_refusal(dtype, 1, width, width) or line_refusal(line) or turned


def _plain(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], seed: int | None) -> Tensor:
    line, turn = Line(scales.shape[0], tuple(shifts), taps.shape[1]), _turn(x.shape[-1], seed)
    turned = x if turn is None else hadamard(x, turn, dtype=torch.float32)
    return reference.trellis_product(turned, codes, taps, scales, line).to(x.dtype)


__all__ = ["ready_product", "trellis_product"]
