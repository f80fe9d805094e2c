"""From a reduced linear's factors to an encoded matrix: a pair of them, gauge-fixed, or beside a quantized matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.codecs.combined.sum import Sum
from tersor.codecs.low_rank.interpolative import Interpolative, take_apart
from tersor.codecs.low_rank.low_rank import LowRank
from tersor.codecs.scalar.dense import Dense
from tersor.contract.codec import Codec, Encoded
from tersor.contract.nesting import nest_tensors
from tersor.numerics.settings import pinned
from tersor.payload.blocks import Shape
from tersor.rom.linear import Moments, Reduced, Target, reduce

RIDGE = 1e-6  # share of the mean diagonal added where a factor is solved for: quantized components may coincide


def corrected(backbone: Codec, codec: Codec, rank: int | None) -> Codec:
    """Return the codec of a quantized matrix with a correction of a rank; without one for None."""
    return backbone if rank is None else Sum((backbone, LowRank(rank, codec, codec)))


def encode_corrected(weight: Tensor, rank: int | None, backbone: Codec, codec: Codec, moments: Moments,
                     seed: int = 0) -> Encoded:
    """Quantize a matrix (out, in), and what that loses to low rank: the best correction of its outputs.

    `min E|(W - Q(W) - L Rᵀ) x|²` is a reduction of `W - Q(W)`: QERA (arXiv 2410.06040) without inverse or square root.

    Parameters
    ----------
    backbone, codec : Codec
        Of the matrix, and of the correction's factors.
    """
    with pinned():
        first = encode_with(backbone, weight, moments.second, seed)
        outer = corrected(backbone, codec, rank)
        if rank is None:
            return first
        found = reduce(weight.to(torch.float64) - first.decode(), moments, Target("outputs"))
        second = _pair(LowRank(rank, codec, codec), *found.factors(rank), moments, seed)
        return Encoded(outer, first.shape, {**nest_tensors("0", first.tensors), **nest_tensors("1", second.tensors)})


def codec_for(rank: int, storage: str, codec: Codec, shape: Shape) -> Codec:
    """Return the codec of a reduced matrix of `shape` (out, in), its factors coded by `codec`.

    Gauge-fixed, rows are chosen where they are no more than columns: the index is a bit each.
    """
    if storage == "pair":
        return LowRank(rank, codec, codec)
    return Interpolative(rank, codec, codec, "rows" if shape[0] <= shape[1] else "columns")


def encode_reduced(found: Reduced, rank: int, storage: str, codec: Codec, moments: Moments,
                   seed: int = 0) -> tuple[Encoded, Tensor | None]:
    """Return a reduced linear of one rank, encoded, and the bias (out,) that goes with what it decodes to, if any.

    Parameters
    ----------
    storage : str
        `"pair"` or `"gauge"`.
    codec : Codec
        Of both factors. Where it loses bits, the left factor is solved for and encoded given the right one as decoded.
    moments : Moments
        Of the inputs: what errors of factors are weighed by.
    """
    left, right = found.factors(rank)
    outer = codec_for(rank, storage, codec, (left.shape[0], right.shape[0]))
    with pinned():
        encoded = _pair(outer, left, right, moments, seed) if isinstance(outer, LowRank) else (
            _gauge(outer, left, right, moments, seed))
        return encoded, found.bias(encoded.decode())


def _pair(outer: LowRank, left: Tensor, right: Tensor, moments: Moments, seed: int) -> Encoded:
    """Encode `L Rᵀ`, R first."""
    second = encode_with(outer.right, right, None, seed)
    metric = None
    if not isinstance(outer.left, Dense):
        decoded = second.decode().to(torch.float64)
        metric = decoded.T @ moments.second @ decoded
        left = _given(left @ (right.T @ moments.second @ decoded), metric)
    return outer.join(encode_with(outer.left, left, metric, seed), second)


def _gauge(outer: Codec, left: Tensor, right: Tensor, moments: Moments, seed: int) -> Encoded:
    """Encode the gauge-fixed form, the right factor first; the left one again given what that decodes to."""
    assert isinstance(outer, Interpolative)
    shape, rows = (left.shape[0], right.shape[0]), outer.axis == "rows"
    chosen, parts = take_apart(left, right, outer.axis)
    others = _complement(chosen, shape[0 if rows else 1])
    lossy, metric = not isinstance(outer.left, Dense), None
    encoded = {}
    if 0 not in parts["right"].shape:
        inside = moments.second if rows else moments.second[others][:, others]
        encoded["right"] = encode_with(outer.right, parts["right"], inside if lossy else None, seed)
    if lossy:
        decoded = encoded["right"].decode().to(torch.float64) if encoded else parts["right"]
        if not rows:
            spread = torch.zeros(outer.rank, shape[1], dtype=torch.float64)
            spread[torch.arange(outer.rank), chosen] = 1.0
            spread[:, others] = decoded
            decoded = spread
        metric = decoded @ moments.second @ decoded.T
        wanted = left[others] if rows else left
        parts["left"] = _given(wanted @ (right.T @ moments.second @ decoded.T), metric)
    if 0 not in parts["left"].shape:
        encoded["left"] = encode_with(outer.left, parts["left"], metric, seed)
    return outer.join(shape, chosen, encoded)


def _complement(chosen: Tensor, count: int) -> Tensor:
    marks = torch.ones(count, dtype=torch.bool)
    marks[chosen] = False
    return marks.nonzero().flatten()


def _given(product: Tensor, metric: Tensor) -> Tensor:
    """Return the factor F that minimizes `tr(F M Fᵀ) - 2 tr(F Bᵀ)`, slightly damped: `B M⁻¹`."""
    damped = metric + RIDGE * float(metric.diagonal().mean()) * torch.eye(len(metric), dtype=metric.dtype)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return product @ torch.linalg.pinv(damped) if int(failed) else torch.cholesky_solve(product.T, factor).T


def encode_with(codec: Codec, matrix: Tensor, hessian: Tensor | None, seed: int) -> Encoded:
    """Encode a factor, with error feedback where there is a Hessian and the codec can."""
    options: dict[str, Any] = {}
    if hessian is not None and "feedback" in codec.option_names():
        options["feedback"] = True
    wide = matrix.to(torch.float32).contiguous()
    metric = None if hessian is None else hessian.to(torch.float32)
    return codec.encode(wide, hessian=metric, seed=seed, options=options, tables=codec.train([wide], seed=seed))
