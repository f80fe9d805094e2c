"""How far blocks are from their tensor, by parts of rows, so that memory does not grow with the tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tersor.gguf.encode import decode
from tersor.gguf.types.base import BlockType
from tersor.numerics.settings import pinned
from tersor.quality import Errors, errors_of

PART = 1 << 22  # weights at a time


def parts(matrix: Tensor, stored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of a matrix (out, in), and their bytes, some at a time."""
    count = max(1, PART // matrix.shape[1])
    yield from zip(matrix.split(count), stored.reshape(len(matrix), -1).split(count), strict=True)


def measured(kind: BlockType, stored: Tensor, matrix: Tensor, hessian: Tensor | None) -> Errors:
    """Return the errors of the bytes of a matrix (out, in)."""
    with pinned():
        return errors_of(((rows.to(torch.float32), decode(kind, blocks, matrix.shape[1]))
                          for rows, blocks in parts(matrix, stored)), hessian)
