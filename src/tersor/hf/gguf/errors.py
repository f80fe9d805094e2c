"""How far blocks are from their tensor, by parts of rows, so that memory does not grow with the tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tersor.gguf.encode import decode
from tersor.gguf.types.base import BlockType
from tersor.numerics.settings import pinned

PART = 1 << 22  # weights at a time


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative squared errors of one tensor.

    Attributes
    ----------
    relative : float
        `‖W - Ŵ‖² / ‖W‖²`.
    distortion : float
        `tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ)`; equal to `relative` without second moments H.
    """

    relative: float
    distortion: float


def parts(matrix: Tensor, stored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of a matrix (out, in), and their bytes, some at a time."""
    count = max(1, PART // matrix.shape[1])
    yield from zip(matrix.split(count), stored.reshape(len(matrix), -1).split(count), strict=True)


def measured(kind: BlockType, stored: Tensor, matrix: Tensor, hessian: Tensor | None) -> Errors:
    """Return the errors of the bytes of a matrix (out, in)."""
    sums = [0.0] * 4
    with pinned():
        for rows, blocks in parts(matrix, stored):
            wide = rows.to(torch.float32)
            error = wide - decode(kind, blocks, matrix.shape[1])
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
