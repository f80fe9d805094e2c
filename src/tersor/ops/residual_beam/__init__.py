"""Codes of sums of codewords, one of each stage: the best of some paths that are kept from stage to stage.

Chen, Guan and Wang, Sensors 10 (2010), as FAISS' residual quantizers do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.dispatch import compiled_allowed

CHUNK = 1 << 20  # products at a time: they stay near the processor


class Beam:
    """Paths of some vectors through the stages so far.

    Parameters
    ----------
    vectors : Tensor
        float32 (n, dim).
    width : int
        Paths that are kept for each vector.

    Attributes
    ----------
    left : Tensor
        What paths leave of the vectors, float32 (n, paths, dim).
    codes : Tensor
        int32 (n, paths, stages).
    """

    def __init__(self, vectors: Tensor, width: int) -> None:
        self.width = width
        self.left = vectors.unsqueeze(1)
        self.codes = torch.zeros(len(vectors), 1, 0, dtype=torch.int32)

    def extend(self, book: Tensor, rounding: float = 0.0) -> None:
        """Go on through a stage of codewords, float32 (words, dim): those of least squared error are kept.

        What a path leaves is nothing where no number of it is larger than `rounding`.
        """
        squares, twice = book.square().sum(1), (-2 * book).T.contiguous()
        count, paths = self.left.shape[:2]
        kept = min(self.width, paths * len(book))
        chosen = torch.empty(count, kept, dtype=torch.int64)
        step = max(1, CHUNK // (paths * len(book)))
        for start in range(0, count, step):
            left = self.left[start : start + step]
            _choose(left @ twice, squares, left.square().sum(2), chosen[start : start + step])
        path, word = chosen // len(book), chosen % len(book)
        rows = torch.arange(count).unsqueeze(1)
        self.left = self.left[rows, path] - book[word]
        if rounding:
            self.left.masked_fill_(self.left.abs().amax(2, keepdim=True) <= rounding, 0.0)
        self.codes = torch.cat([self.codes[rows, path], word.to(torch.int32).unsqueeze(2)], 2)

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the codes of the best path, int32 (n, stages), and what it leaves, float32 (n, dim)."""
        first = self.left.square().sum(2).argmin(1)
        rows = torch.arange(len(first))
        return self.codes[rows, first], self.left[rows, first]


def beam(vectors: Tensor, books: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return codes, int32 (n, stages), of vectors (n, dim) in codebooks (stages, words, dim), and what they leave."""
    step = max(1, CHUNK // (width * max(books.shape[1:])))
    parts = []
    for start in range(0, len(vectors), step):
        paths = Beam(vectors[start : start + step], width)
        for book in books:
            paths.extend(book)
        parts.append(paths.best())
    codes, left = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(left)


def _choose(products: Tensor, squares: Tensor, totals: Tensor, chosen: Tensor) -> None:
    """Write the continuations of least cost, int64 (n, kept): `path * words + word`, rising; of equals the first."""
    if compiled_allowed("residual_beam"):
        from tersor.ops.residual_beam.kernels.beam import choose

        costs = torch.empty(chosen.shape, dtype=torch.float32)
        choose(products.numpy(), squares.numpy(), totals.numpy(), chosen.numpy(), costs.numpy())
        return
    costs = (products + squares + totals.unsqueeze(2)).flatten(1)
    chosen.copy_(costs.sort(dim=1, stable=True).indices[:, : chosen.shape[1]].sort(dim=1).values)


__all__ = ["Beam", "beam"]
