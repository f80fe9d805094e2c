"""Vectors times linear trellis codes along outputs: one meets signs and filter in one launch, several as bit planes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear import codebook_linear, widened
from tersor.ops.codebook_linear import ready_product as ready_signs
from tersor.ops.codebook_linear.launch.operand import Around
from tersor.ops.codebook_linear.shapes.limits import refusal as signs_refusal
from tersor.ops.codebook_linear.surrounding import check, joined, normed
from tersor.ops.dispatch import take_reference
from tersor.ops.hadamard import hadamard
from tersor.ops.hadamard.shapes import refusal as rotation_refusal
from tersor.ops.tapes import Taped
from tersor.ops.trellis_linear import ready_filter, trellis_filter
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_linear.shapes import refusal as line_refusal
from tersor.ops.trellis_product import reference
from tersor.ops.trellis_product.shapes.several import fastest_until
from tersor.ops.trellis_product.shapes.several import refusal as counts_refusal
from tersor.payload.blocks import Few, after


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


@trellis_product.register_kernel("cpu")
def _(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *,
      rotation: int | None = None) -> Tensor:
    line = Line(scales.shape[0], tuple(shifts), taps.shape[1])
    table, ones = _signs(line.stream)
    signs = codebook_linear(widened(x), codes, table, ones, None, 1, x.shape[-1], "symmetric", rotation=rotation)
    return trellis_filter(signs, taps, scales, shifts, line.length).to(x.dtype)


@trellis_product.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], *,
      rotation: int | None = None) -> Tensor:
    turned = rotation is not None
    if rotation is not None and rotation_refusal(x.shape[-1]) is not None:  # then torch rotates, kernels multiply
        x, rotation = hadamard(x, Rotation(x.shape[-1], rotation)), None
    line, turn = Line(scales.shape[0], tuple(shifts), taps.shape[1]), _turn(x.shape[-1], rotation)
    if not x.numel() or take_reference("trellis_product", _refusal(line, x.dtype, x.shape[-1]), x.device):
        return _plain(x, codes, taps, scales, shifts, rotation)
    from tersor.ops.trellis_product.launch import choose

    return choose.product(x, codes, taps, scales.contiguous(), line, turn, turned=turned)


def ready_product(codes: Tensor, taps: Tensor, scales: Tensor, line: Line, width: int, *,
                  rotation: int | None = None) -> Few | None:
    """Return `trellis_product` of few vectors, made ready; None where there is none on a device."""
    if codes.device.type == "cpu":
        table, ones = _signs(line.stream)
        signs = ready_signs(codes, table, ones, None, 1, (width, width), "symmetric", rotation=rotation)
        return after(ready_filter(taps, scales, line), signs)
    turn = _turn(width, rotation)
    reason = _refusal(line, torch.float32, width) or (None if turn is None else rotation_refusal(width))
    if not codes.is_cuda or not line.length or take_reference("trellis_product", reason, codes.device):
        return None
    from tersor.ops.trellis_product.launch import choose

    return Taped(lambda x: choose.product(x, codes, taps, scales, line, turn, turned=turn is not None))


@torch.library.custom_op("tersor::fused_trellis_product", mutates_args=())
def fused_trellis_product(x: Tensor, norm: Tensor | None, codes: Sequence[Tensor], taps: Tensor,
                          scales: Sequence[Tensor], added: Tensor | None, shifts: Sequence[int], *,
                          rotation: int | None = None, eps: float = 0.0) -> Tensor:
    """Return (*batch, all lengths): products with several matrices of one filter, and what stands around them.

    What `tersor.compiling` makes of products that meet the same vectors, of a norm before and of a sum after. One
    vector is served by one kernel.

    Parameters
    ----------
    x, taps, shifts, rotation
        As of `trellis_product`.
    norm, added, eps
        As of `fused_codebook_linear`.
    codes, scales : sequence of Tensor
        Of each matrix, as of `trellis_product`.

    Raises
    ------
    CodecConfigError
        If there are not as many codes as scales, or `norm` or `added` have another shape.
    """
    check(x, norm, codes, scales, added)
    return joined(_one_by_one(normed(x, norm, eps), codes, taps, scales, shifts, rotation), added, False)


@fused_trellis_product.register_fake
def _(x: Tensor, norm: Tensor | None, codes: Sequence[Tensor], taps: Tensor, scales: Sequence[Tensor],
      added: Tensor | None, shifts: Sequence[int], *, rotation: int | None = None, eps: float = 0.0) -> Tensor:
    del norm, codes, taps, added, shifts, rotation, eps
    return x.new_empty(*x.shape[:-1], sum(scale.shape[0] for scale in scales))


@fused_trellis_product.register_kernel("cuda")
def _(x: Tensor, norm: Tensor | None, codes: Sequence[Tensor], taps: Tensor, scales: Sequence[Tensor],
      added: Tensor | None, shifts: Sequence[int], *, rotation: int | None = None, eps: float = 0.0) -> Tensor:
    check(x, norm, codes, scales, added)
    width = x.shape[-1]
    if rotation is not None and rotation_refusal(width) is not None:
        x, norm, rotation = hadamard(normed(x, norm, eps), Rotation(width, rotation)), None, None
    lines = [Line(one.shape[0], tuple(shifts), taps.shape[1]) for one in scales]
    reason = next((one for line in lines if (one := _refusal(line, x.dtype, width)) is not None), None)
    if x.numel() == width and not take_reference("trellis_product", reason, x.device):
        from tersor.ops.trellis_product.launch.one import joined as joined_vector

        before, behind = (None if one is None else one.contiguous() for one in (norm, added))
        around = Around(() if rotation is None else (Rotation(width, rotation),), before, eps, behind)
        y = joined_vector(x, codes, taps, [one.contiguous() for one in scales], lines, around)
        if y is not None:
            return y
    return joined(_one_by_one(normed(x, norm, eps), codes, taps, scales, shifts, rotation), added, False)


def _one_by_one(x: Tensor, codes: Sequence[Tensor], taps: Tensor, scales: Sequence[Tensor], shifts: Sequence[int],
                rotation: int | None) -> list[Tensor]:
    return [trellis_product(x, one, taps, scale, shifts, rotation=rotation)
            for one, scale in zip(codes, scales, strict=True)]


def most_counted(line: Line, width: int) -> int:
    """Return up to how many rotated vectors of 16 bits CUDA counts bits for, where that is the fastest; 0 for none."""
    return 0 if counts_refusal(torch.bfloat16, line, width, 2) is not None else fastest_until(line)


@lru_cache(maxsize=64)
def _signs(stream: int) -> tuple[Tensor, Tensor]:
    """Return, for the processor, what a bit stands for, and the scales of streams: ones, since the filter scales."""
    return torch.tensor([-1.0, 1.0], dtype=torch.float32), torch.ones(stream, 1, dtype=torch.bfloat16)


def _turn(width: int, seed: int | None) -> Rotation | None:
    return None if seed is None else Rotation(width, seed)


def _refusal(line: Line, dtype: torch.dtype, width: int) -> str | None:
    """Return why no kernels take a product, or None: also the two of many launches must."""
    return signs_refusal(dtype, 1, width, width) or line_refusal(line)


def _plain(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, shifts: Sequence[int], seed: int | None) -> Tensor:
    line, turn = Line(scales.shape[0], tuple(shifts), taps.shape[1]), _turn(x.shape[-1], seed)
    turned = x if turn is None else hadamard(x, turn, dtype=torch.float32)
    return reference.trellis_product(turned, codes, taps, scales, line).to(x.dtype)


__all__ = ["fused_trellis_product", "most_counted", "ready_product", "trellis_product"]
