"""Codebooks for the two parts of a Kashin decomposition, whose values gather around few peaks.

Greedy steps leave `± c₁ ± c₂ ..`, the same lengths in every element, so that the sums of the leading steps' lengths
with all signs are the peaks, all but for what later steps add: the start of k-means (the closed-form centroids of arXiv
2609.11687).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tersor.numerics.kmeans import assign, kmeans
from tersor.numerics.lloyd import lloyd

SAMPLE = 1 << 18  # points of a book that it is fitted on


@dataclasses.dataclass(frozen=True)
class Fit:
    """How codebooks are fitted.

    Parameters
    ----------
    levels : int
        Pairs of a codebook.
    separate : bool
        √levels values for each part by themselves; else two-dimensional k-means.
    rounds : int
        Most Lloyd iterations from each start.
    restarts : int
        Starts by k-means++.
    closed_form : bool
        Start from the leading steps too.
    seed : int
    """

    levels: int
    separate: bool
    rounds: int = 20
    restarts: int = 1
    closed_form: bool = True
    seed: int = 0

    def books(self, points: Tensor, leading: Tensor) -> Tensor:
        """Return codebooks as they are stored, fp16 (books, levels, 2) or, if separate, (books, 2, √levels).

        Parameters
        ----------
        points : Tensor
            (u, v) of every element, float32 (books, n, 2).
        leading : Tensor
            Lengths of the leading steps, float32 (books, steps, 2), of `tersor.codecs.bases.splitting.Split`.
        """
        limit = torch.finfo(torch.float16).max
        points = points[:, :: max(1, points.shape[1] // SAMPLE)]
        if not self.separate:
            return self._best(points, self.levels, leading).clamp_(-limit, limit).to(torch.float16)
        side = math.isqrt(self.levels)
        parts = [self._best(points[..., i : i + 1], side, leading[..., i : i + 1]) for i in (0, 1)]
        return torch.cat(parts, -1).transpose(1, 2).clamp_(-limit, limit).to(torch.float16)

    def _best(self, points: Tensor, words: int, leading: Tensor) -> Tensor:
        """Return the best centroids found (books, words, dim) for points (books, n, dim)."""
        best = torch.zeros(len(points), words, points.shape[-1], dtype=torch.float32, device=points.device)
        least = torch.full((len(points),), torch.inf, dtype=torch.float32, device=points.device)
        for start in self._starts(points, words, leading):
            centroids = lloyd(points, start, self.rounds)
            cost = distortion(points, centroids)
            best = torch.where((cost < least)[:, None, None], centroids, best)
            least = torch.minimum(cost, least)
        return best

    def _starts(self, points: Tensor, words: int, leading: Tensor) -> Iterator[Tensor]:
        if self.closed_form and bool(leading.any()):
            yield sign_sums(leading, words)
        tiled = points.repeat(1, -(-words // points.shape[1]), 1)  # k-means wants a point a word
        for restart in range(max(self.restarts, int(not self.closed_form or not bool(leading.any())))):
            yield kmeans(tiled, words, iterations=0, seed=self.seed + restart, init="kmeans++")


def pairs(book: Tensor, *, separate: bool) -> Tensor:
    """Return stored codebooks as pairs, float32 (books, levels, 2)."""
    wide = book.to(torch.float32)
    if not separate:
        return wide
    side = wide.shape[2]
    return torch.stack([wide[:, 0].repeat_interleave(side, dim=1), wide[:, 1].repeat(1, side)], -1)


def sign_sums(leading: Tensor, words: int) -> Tensor:
    """Return lengths (books, steps, dim) summed with all signs, float32 (books, words, dim).

    Of one part alone its longest steps count. Where words is no power of two, the last patterns are left out.
    """
    count = min(leading.shape[1], math.ceil(math.log2(words)))
    if leading.shape[-1] == 1:
        leading = leading.sort(dim=1, descending=True, stable=True).values
    place = torch.arange(words, device=leading.device).unsqueeze(1)
    signs = 1.0 - 2.0 * (place >> torch.arange(count, device=leading.device) & 1).to(torch.float32)
    return signs @ leading[:, :count]


def distortion(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the mean squared distance to the nearest centroid, float32 (books,)."""
    chosen = assign(points, centroids).unsqueeze(-1).expand(-1, -1, points.shape[-1])
    return (points - centroids.gather(1, chosen)).square().sum(-1).mean(-1)
