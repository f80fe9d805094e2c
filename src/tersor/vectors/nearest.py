"""The best k of scores that arrive in blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 64  # scores that one maximum stands for
WORST = torch.finfo(torch.float32).max


class Best:
    """Running top k of each query, best first; of equal scores the lowest id.

    Attributes
    ----------
    scores, ids : Tensor
        float32 and int64 (queries, k); -infinity and -1 where fewer than k were offered.
    """

    def __init__(self, queries: int, k: int, device: torch.device | None = None) -> None:
        self.scores = torch.full((queries, k), -math.inf, device=device)
        self.ids = torch.full((queries, k), -1, device=device)

    def offer(self, scores: Tensor, numbers: Tensor) -> None:
        """Merge scores (queries, n), minus infinity for what is not offered, of distinct ids, int64 (n,)."""
        if bool((numbers[1:] < numbers[:-1]).any()):
            numbers, order = numbers.sort()
            scores = scores[:, order]
        count, k = scores.shape[1], self.ids.shape[1]
        floor = self.scores[:, -1:]
        if count % GROUP:
            scores = torch.nn.functional.pad(scores, (0, -count % GROUP), value=-math.inf)
        groups = scores.unflatten(1, (-1, GROUP))
        peaks = groups.amax(2)
        take = min(k, count)
        most = 2 * len(scores) * take
        for last in (False, True):
            if last:  # what is not in the top k of these is of no use
                floor = torch.maximum(floor, scores.topk(take).values[:, -1:])
            query, group = ((peaks >= floor) & (peaks > -math.inf)).nonzero(as_tuple=True)
            if len(query) > most:
                continue
            near = groups[query, group]
            place, inside = ((near >= floor[query]) & (near > -math.inf)).nonzero(as_tuple=True)
            if len(place) <= most:
                self._merge(query[place], near[place, inside], numbers[group[place] * GROUP + inside])
                return
        values, order = scores.sort(dim=1, descending=True, stable=True)  # many equal scores
        query, values, order = _numbered(scores, take), values[:, :take], order[:, :take]
        found = (values > -math.inf).reshape(-1)
        padded = torch.nn.functional.pad(numbers, (0, scores.shape[1] - count))
        self._merge(query[found], values.reshape(-1)[found], padded[order.reshape(-1)[found]])

    def _merge(self, query: Tensor, scores: Tensor, ids: Tensor) -> None:
        """Merge candidates: finite scores, and ids."""
        if not len(query):
            return
        queries, k = self.ids.shape
        query = torch.cat([_numbered(self.ids, k), query])
        scores = torch.cat([self.scores.reshape(-1), scores])
        ids = torch.cat([self.ids.reshape(-1), ids])
        order = torch.argsort(ids, stable=True)
        order = order[torch.argsort(scores[order], descending=True, stable=True)]
        order = order[torch.argsort(query[order], stable=True)]
        sizes = torch.bincount(query, minlength=queries)
        chosen = order[(sizes.cumsum(0) - sizes).unsqueeze(1) + torch.arange(k, device=order.device)]
        self.scores, self.ids = scores[chosen], ids[chosen]


def _numbered(rows: Tensor, times: int) -> Tensor:
    """Return the number of each row, so many times, int64."""
    return torch.arange(len(rows), device=rows.device).repeat_interleave(times)
