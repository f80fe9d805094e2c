"""A matrix of codewords: what `product_linear` multiplies by."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Codewords:
    """`W[i, g dim : (g + 1) dim] = book[g][code[i, g]] * scale + offset`, then swapped back.

    Attributes
    ----------
    codes : Tensor
        uint8, packed (`tersor.payload.packing`): (rows, groups) of `words` levels.
    codebooks : Tensor
        float16 or float32 (books, words, dim), one book a group or one for all; or packed, of `levels` levels.
    scale, offset : Tensor or None
        float32 (1,).
    mask : Tensor or None
        uint8, packed bits (rows, layers, width / 2), of `tersor.codecs.transforms.swap`.
    rows, words, dim, books : int
    levels : int
        0 where codebooks are floats.
    layers : int
        0 without swaps.
    """

    codes: Tensor
    codebooks: Tensor
    scale: Tensor | None
    offset: Tensor | None
    mask: Tensor | None
    rows: int
    words: int
    dim: int
    books: int
    levels: int = 0
    layers: int = 0

    @property
    def sizes(self) -> list[int]:
        """All numbers, for the operator."""
        return [self.rows, self.words, self.dim, self.books, self.levels, self.layers]
