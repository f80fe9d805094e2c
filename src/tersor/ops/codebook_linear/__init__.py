"""`x Wᵀ` for packed scalar codes: W[r, k] = scale[r, group] (table[code[r, k]] - zero[r, group])."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear import reference
from tersor.ops.codebook_linear.launch.operand import Around
from tersor.ops.codebook_linear.shapes.lanes import TILED_FROM
from tersor.ops.codebook_linear.shapes.lanes import refusal as lanes_refuse
from tersor.ops.codebook_linear.shapes.limits import refusal
from tersor.ops.codebook_linear.surrounding import check, joined, normed
from tersor.ops.dispatch import compiled_allowed, take_reference
from tersor.ops.hadamard import hadamard, ready_rotation
from tersor.ops.hadamard.shapes import refusal as rotation_refusal
from tersor.ops.tapes import Taped
from tersor.payload.blocks import Few


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
        Seed, below `tersor.ops.hadamard.SEEDS`, of a rotation of the whole width (`tersor.numerics.rotation`) that `x`
        goes through first; the kernel for one vector does it on the way.
    """
    return reference.codebook_linear(_rotated(x, rotation), codes, table, scales, zeros, bits, group).to(x.dtype)


def ready_product(codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
                  shape: tuple[int, int], form: str, *, rotation: int | None = None) -> Few | None:
    """Return `codebook_linear` of few vectors, made ready; None where there is none on a device.

    Parameters
    ----------
    shape : (int, int)
        The width, and the codes of a group.
    """
    if not len(scales) or not shape[0]:
        return None
    if codes.is_cuda:
        return _ready_launches(codes, table, scales, zeros, bits, shape, form, rotation)
    if codes.device.type != "cpu" or lanes_refuse(bits, *shape):
        return None
    turned = None if rotation is None else ready_rotation(Rotation(shape[0], rotation), codes.device)
    if not compiled_allowed("codebook_linear") or (rotation is not None and turned is None):
        return None
    from tersor.ops.codebook_linear import lanes

    product = lanes.Matrix.of(codes, table, scales, zeros, bits, (len(scales), *shape), form).few
    return product if turned is None else lambda x: product(turned(x))


def _ready_launches(codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
                    shape: tuple[int, int], form: str, seed: int | None) -> Few | None:
    width, group = shape
    turn = None if seed is None else Rotation(width, seed)
    reason = refusal(torch.float32, bits, width, group) or (None if turn is None else rotation_refusal(width))
    if take_reference("codebook_linear", reason, codes.device):
        return None
    from tersor.ops.codebook_linear.launch import choose
    from tersor.ops.hadamard import launch as turning

    def product(x: Tensor) -> Tensor:
        if turn is None:
            return choose.codebook_linear(x, codes, table, scales, zeros, bits, group, form)
        y = None if zeros is not None else choose.one_vector_linear(x, [codes], table, [scales], bits, form,
                                                                    Around([turn]))
        if y is not None:
            return y
        turned = turning.rotate(x, turn, False, x.dtype)
        return choose.codebook_linear(turned, codes, table, scales, zeros, bits, group, form)

    return Taped(product)


def widened(x: Tensor) -> Tensor:
    """Return vectors as the processor multiplies them: few, or of no bf16, in float32."""
    few = x.numel() < TILED_FROM * x.shape[-1]
    if x.dtype == torch.float32:
        return x  # in a graph, each conversion would be a vector of its own
    return x.to(torch.float32) if few or x.dtype != torch.bfloat16 else x


def _rotated(x: Tensor, rotation: int | None) -> Tensor:
    return x if rotation is None else hadamard(x, Rotation(x.shape[-1], rotation), dtype=torch.float32)


@codebook_linear.register_fake
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int,
      form: str = "any", *, rotation: int | None = None) -> Tensor:
    del codes, table, zeros, bits, group, form, rotation
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@codebook_linear.register_kernel("cpu")
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int,
      form: str = "any", *, rotation: int | None = None) -> Tensor:
    turned = _rotated(x, rotation)
    if x.numel() and compiled_allowed("codebook_linear") and not lanes_refuse(bits, x.shape[-1], group):
        from tersor.ops.codebook_linear import lanes

        return lanes.codebook_linear(turned, codes, table, scales, zeros, bits, group, form).to(x.dtype)
    return reference.codebook_linear(turned, codes, table, scales, zeros, bits, group).to(x.dtype)


@codebook_linear.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int,
      form: str = "any", *, rotation: int | None = None) -> Tensor:
    if take_reference("codebook_linear", refusal(x.dtype, bits, x.shape[-1], group), x.device):
        return reference.codebook_linear(_rotated(x, rotation), codes, table, scales, zeros, bits, group).to(x.dtype)
    from tersor.ops.codebook_linear.launch import choose

    if rotation is not None:
        turn = Rotation(x.shape[-1], rotation)
        y = None if zeros is not None else choose.one_vector_linear(x, [codes], table, [scales], bits, form,
                                                                    Around([turn]))
        if y is not None:
            return y
        x = hadamard(x, turn)
    return choose.codebook_linear(x, codes, table, scales, zeros, bits, group, form)


@torch.library.custom_op("tersor::codebook_linear_back", mutates_args=())
def _back(incoming: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int,
          width: int) -> Tensor:
    return reference.gradient(incoming, codes, table, scales, zeros, bits, group, width)


@_back.register_fake
def _(incoming: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int,
      width: int) -> Tensor:
    del codes, table, scales, zeros, bits, group
    return torch.empty(*incoming.shape[:-1], width, dtype=torch.float32, device=incoming.device)


def _keep(ctx, inputs, keyword_only_inputs, output) -> None:  # noqa: ANN001 - torch names no type for it
    del output
    x, *tensors, ctx.bits, ctx.group, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.x_dtype, ctx.width, ctx.rotation = x.dtype, x.shape[-1], keyword_only_inputs["rotation"]


def _backward(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001 - as above
    x = _back(incoming, *ctx.saved_tensors, ctx.bits, ctx.group, ctx.width)
    if ctx.rotation is not None:
        x = hadamard(x, Rotation(ctx.width, ctx.rotation), inverse=True)
    return x.to(ctx.x_dtype), *(None,) * 7


codebook_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("tersor::fused_codebook_linear", mutates_args=())
def fused_codebook_linear(x: Tensor, norm: Tensor | None, codes: Sequence[Tensor], table: Tensor,
                          scales: Sequence[Tensor], added: Tensor | None, bits: int, form: str = "any", *,
                          rotation: int | None = None, eps: float = 0.0, gated: bool = False) -> Tensor:
    """Return (*batch, all rows): products with several matrices of one codebook, and what stands around them.

    What `tersor.compiling` makes of products that meet the same vectors (queries, keys and values), of a norm before
    and of a sum after. One vector is served by one kernel.

    Parameters
    ----------
    x, table, bits, form, rotation
        As of `codebook_linear`.
    norm : Tensor or None
        (width,): vectors are first divided by their root mean square, then multiplied by this.
    eps : float
        Added to the mean square.
    codes, scales : sequence of Tensor
        Of each matrix, as of `codebook_linear`; a scale a row.
    added : Tensor or None
        Of the shape of what is returned, to which it is added.
    gated : bool
        Return (*batch, rows): the product with the second of two matrices of so many rows, times `silu` of the product
        with the first.

    Raises
    ------
    CodecConfigError
        If there are not as many codes as scales, a gate's matrices are not two of as many rows, or `norm` or `added`
        have another shape.
    """
    check(x, norm, codes, scales, added, gated=gated)
    return joined(_one_by_one(normed(x, norm, eps), codes, table, scales, bits, form, rotation), added, gated)


def _one_by_one(x: Tensor, codes: Sequence[Tensor], table: Tensor, scales: Sequence[Tensor], bits: int, form: str,
                rotation: int | None) -> list[Tensor]:
    return [codebook_linear(x, one, table, scale, None, bits, x.shape[-1], form, rotation=rotation)
            for one, scale in zip(codes, scales, strict=True)]


@fused_codebook_linear.register_fake
def _(x: Tensor, norm: Tensor | None, codes: Sequence[Tensor], table: Tensor, scales: Sequence[Tensor],
      added: Tensor | None, bits: int, form: str = "any", *, rotation: int | None = None, eps: float = 0.0,
      gated: bool = False) -> Tensor:
    del codes, table, bits, form, rotation, norm, eps, added
    return x.new_empty(*x.shape[:-1], sum(scale.shape[0] for scale in (scales[:1] if gated else scales)))


@fused_codebook_linear.register_kernel("cuda")
def _(x: Tensor, norm: Tensor | None, codes: Sequence[Tensor], table: Tensor, scales: Sequence[Tensor],
      added: Tensor | None, bits: int, form: str = "any", *, rotation: int | None = None, eps: float = 0.0,
      gated: bool = False) -> Tensor:
    check(x, norm, codes, scales, added, gated=gated)
    width = x.shape[-1]
    if x.numel() == width and not take_reference("codebook_linear", refusal(x.dtype, bits, width, width), x.device):
        from tersor.ops.codebook_linear.launch import choose

        norm, after = (None if one is None else one.contiguous() for one in (norm, added))
        if rotation is not None:
            around = Around([Rotation(width, rotation)], norm, eps, after, gated)
            y = choose.one_vector_linear(x, codes, table, scales, bits, form, around)
            if y is not None:
                return y
            x, rotation, norm = hadamard(normed(x, norm, eps), Rotation(width, rotation)), None, None
        x, norm = normed(x, norm, eps), None
        y = choose.one_vector_linear(x, codes, table, scales, bits, form, Around(added=after, gated=gated))
        if y is not None:
            return y
    return joined(_one_by_one(normed(x, norm, eps), codes, table, scales, bits, form, rotation), added, gated)
