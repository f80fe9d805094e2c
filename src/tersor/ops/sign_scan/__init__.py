"""The best rows of many, each a line of signs: a search among codes that are never decoded.

Row r scores `factors[r] * (products @ signs[r]) + offsets[r] * weight` for a query of `products` and a weight. So
scores are inner products, cosines, or, with half of each row's squared norm as its offset, an order by distance.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tersor.ops.dispatch import compiled_allowed
from tersor.ops.sign_scan import reference
from tersor.ops.sign_scan.shapes import TILE, WORD, words_of


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a set, as a scan reads them.

    Attributes
    ----------
    words : Tensor
        Signs, int32 (tiles, words, TILE); see `laid_out`.
    factors, offsets : Tensor
        float32 (count,), finite; factors not negative.
    first : int
        The id of the first row.
    """

    words: Tensor
    factors: Tensor
    offsets: Tensor
    first: int


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """All rows of a set, in pieces with rising ids, on the processor."""

    pieces: tuple[Rows, ...]

    def __reduce__(self) -> tuple[type[Lines], tuple[tuple[Rows, ...]]]:
        """Copy without the addresses: those of a copy are others."""
        return Lines, (self.pieces,)

    @cached_property
    def peaks(self) -> tuple[float, float]:
        """The largest factor, and the largest magnitude of an offset."""
        return (max(float(one.factors.max()) for one in self.pieces),
                max(float(one.offsets.abs().max()) for one in self.pieces))

    @cached_property
    def places(self) -> np.ndarray:
        """Addresses of words, factors and offsets, counts and first ids, int64 (pieces, 5)."""
        return np.array([(one.words.data_ptr(), one.factors.data_ptr(), one.offsets.data_ptr(), len(one.factors),
                          one.first) for one in self.pieces], np.int64)


def laid_out(bits: Tensor) -> Tensor:
    """Return rows of bits, uint8 (n, bits) of 0 and 1, in tiles: int32 (tiles, words, TILE), padded with 0."""
    count, width = bits.shape
    words = words_of(width)
    wide = np.zeros((-(-count // TILE) * TILE, words * WORD), np.uint8)
    wide[:count, :width] = bits.numpy()
    packed = np.packbits(wide, axis=1, bitorder="little").view(np.dtype("<i4"))
    return torch.from_numpy(np.ascontiguousarray(packed.reshape(-1, TILE, words).transpose(0, 2, 1), np.int32))


def best(lines: Lines, products: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores, float64, and ids, int64, of the best rows of each query, (queries, k).

    Best first; of equal scores the least id first. Where there are fewer rows, minus infinity and -1.

    Parameters
    ----------
    lines : Lines
    products : Tensor
        What signs are multiplied by, float64 (queries, bits), finite.
    weights : Tensor
        Of offsets, float64 (queries,).
    k : int
        At least 1.

    Notes
    -----
    The kernel bounds every score by counting bits, with queries rounded to bit planes as RaBitQ's are (Gao, Long;
    SIGMOD 2024, arXiv 2405.12497), and computes in float64 those whose bound reaches the k-th best so far. The bound is
    certain, so results are those of float64, on any number of threads.
    """
    if compiled_allowed("sign_scan"):
        from tersor.ops.sign_scan import compiled

        return compiled.best(lines, products, weights, k)
    return reference.best(lines, products, weights, k)


__all__ = ["Lines", "Rows", "best", "laid_out"]
