"""How far a decoded matrix is from its original."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tersor.numerics.settings import pinned

PART = 1 << 22  # weights at a time


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative squared errors of one matrix.

    Attributes
    ----------
    relative : float
        `‖W - Ŵ‖² / ‖W‖²`.
    distortion : float
        `tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ)`; equal to `relative` without second moments H.
    """

    relative: float
    distortion: float


def measured(matrix: Tensor, decoded: Tensor, hessian: Tensor | None) -> Errors:
    """Return the errors of a decoded matrix (out, in), by parts of rows."""
    sums = [0.0] * 4
    count = max(1, PART // matrix.shape[1])
    with pinned():
        for rows, found in zip(matrix.split(count), decoded.split(count), strict=True):
            wide = rows.to(torch.float32)
            error = wide - found
            pairs = [(error, error), (wide, wide)]
            if hessian is not None:
                pairs += [(error @ hessian, error), (wide @ hessian, wide)]
            for place, (left, right) in enumerate(pairs):
                sums[place] += float((left * right).sum(dtype=torch.float64))
    relative = _ratio(sums[0], sums[1])
    return Errors(relative, relative if hessian is None else _ratio(max(sums[2], 0.0), sums[3]))


def _ratio(noise: float, signal: float) -> float:
    if signal > 0:
        return noise / signal
    return 0.0 if noise == 0 else math.inf
