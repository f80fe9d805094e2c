"""The declaration of stored tensors: a *layout* maps the name of every stored tensor to its `TensorSpec`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeAlias

import torch

from tersor.errors import CodecConfigError

MAX_LEVELS = 2**16


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One stored tensor.

    Parameters
    ----------
    shape : tuple of int
        Logical shape.
    dtype : torch.dtype
        Stored element type; `torch.uint8` for packed codes.
    levels : int or None
        Set: the tensor holds codes in `[0, levels)`, packed into a 1-D uint8 tensor.
    shared : bool
        A table trained once and shared by many matrices; a store keeps and counts it once.
    ones : int or None
        Set, with two levels: the tensor is a mask that marks so many.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8
    levels: int | None = None
    shared: bool = False
    ones: int | None = None

    def __post_init__(self) -> None:
        if self.levels is not None and not 2 <= self.levels <= MAX_LEVELS:
            raise CodecConfigError(f"levels must lie in [2, {MAX_LEVELS}], found {self.levels}")

    @property
    def numel(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape as stored: 1-D bytes for packed codes."""
        return self.shape if self.levels is None else (packed_nbytes(self.numel, self.levels),)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.stored_shape) * self.dtype.itemsize


Layout: TypeAlias = Mapping[str, TensorSpec]


def radix_word(levels: int) -> tuple[int, int]:
    """Return (bytes a word, digits a word) of the densest word of at most 7 bytes; the shortest such word."""
    best = (1, 0)
    for nbytes in range(1, 8):
        digits = int(8 * nbytes / math.log2(levels) + 1e-12)
        if digits and (not best[1] or digits * best[0] > best[1] * nbytes):
            best = (nbytes, digits)
    return best


def width_of(levels: int) -> int | None:
    """Bits a code when `levels` is a power of two, else None."""
    return levels.bit_length() - 1 if levels & (levels - 1) == 0 else None


def packed_nbytes(count: int, levels: int) -> int:
    """Return the bytes that `count` codes of `levels` levels take."""
    width = width_of(levels)
    if width is not None:
        return -(-count * width // 8)
    nbytes, digits = radix_word(levels)
    return -(-count // digits) * nbytes
