"""Shapes, rows and tables of matrices; and blocks of rows, by which dense temporaries stay bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Shape: TypeAlias = tuple[int, int]
Rows: TypeAlias = slice | Tensor
Tables: TypeAlias = Mapping[str, Tensor]
# a product with few vectors, see `Codec.ready`: on the processor float32 arrays of NumPy, (n, in) to (n, out); on CUDA
# tensors, (*batch, in) to (*batch, out), contiguous, of 16 bits or float32
Few: TypeAlias = Callable[[Any], Any]

BLOCK_ELEMENTS = 1 << 20  # elements of a row block: bounds every dense temporary of decode and matmul


def after(second: Few | None, first: Few | None) -> Few | None:
    """Return one after the other, or None where either is missing."""
    if first is None or second is None:
        return None
    return lambda x: second(first(x))


def shape_of(matrix: Tensor) -> Shape:
    """Return (out, in) of a 2-D tensor."""
    return matrix.shape[0], matrix.shape[1]


def row_blocks(shape: tuple[int, ...], multiple: int = 1) -> Iterable[slice]:
    """Yield slices of rows of about `BLOCK_ELEMENTS` elements, each but the last a multiple of `multiple` rows."""
    step = max(1, BLOCK_ELEMENTS // max(1, shape[1]) // multiple) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
