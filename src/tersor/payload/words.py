"""Rows whose bytes are numbers of words, as attention reads them."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """Rows that are `size (word of byte 0, word of byte 1, …) maps + offset`, with rows' words behind one another.

    Attributes
    ----------
    codes : str
        Name of the stored bytes, uint8 (rows, bytes).
    counts : tuple of int
        Numbers of each byte's words, ascending.
    words : Tensor
        float32 (256, sum of counts): the words of all bytes.
    maps : Tensor
        float32 (heads, sum of counts, dim), those of each head.
    offset : Tensor
        float32 (heads, dim).
    sizes : Tensor or None
        float32 (256,): what one more byte of a row stands for; None: rows have none, and the size 1.
    """

    codes: str
    counts: tuple[int, ...]
    words: Tensor
    maps: Tensor
    offset: Tensor
    sizes: Tensor | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return len(self.counts) + (self.sizes is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Naming:
    """How rows are named: `(row - centre) analysis` are numbers, and each byte the word nearest to some of them.

    Attributes
    ----------
    codes : str
        Name of the stored bytes, uint8 (rows, bytes).
    centre : Tensor
        float32 (heads, dim).
    analysis : Tensor
        float32 (heads, dim, sum of counts).
    words : Tensor
        float32 (256, sum of counts): the words of all bytes; of each head they are multiplied by `weights`.
    weights : Tensor
        float32 (heads, sum of counts).
    counts : tuple of int
        Numbers of each byte's words.
    """

    codes: str
    centre: Tensor
    analysis: Tensor
    words: Tensor
    weights: Tensor
    counts: tuple[int, ...]


__all__ = ["Naming", "Words"]
