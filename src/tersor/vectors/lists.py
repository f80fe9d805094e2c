"""Inverted lists: every vector lies in the list of its nearest centroid, and a search looks into the nearest lists.

Jégou, Douze and Schmid, IEEE TPAMI 33 (2011). Codes hold what the centroid leaves. Since scores are sums, a query meets
codes as if there were no lists, and each list adds the product of the query with its centroid: tables are made once.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.numerics.kmeans import assign, exponent_of, kmeans, times_power

ITERATIONS = 10
MOST_LISTS = 1 << 20
SAMPLES = 64  # vectors a list that centroids are trained on


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Centroids, float32 (lists, dim)."""

    centroids: Tensor

    def __len__(self) -> int:
        return len(self.centroids)

    @cached_property
    def _moved(self) -> dict[torch.device, Lists]:
        return {}

    def __reduce__(self) -> tuple[type[Lists], tuple[Tensor]]:
        """Copy without what lies on devices."""
        return Lists, (self.centroids,)

    def on(self, device: torch.device) -> Lists:
        """Return the same lists on a device, kept; the origin is not computed anew, which may round it otherwise."""
        if device == self.centroids.device:
            return self
        found = self._moved.get(device)
        if found is None:
            found = Lists(self.centroids.to(device))
            vars(found)["origin"] = self.origin.to(device)
            self._moved[device] = found
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the centroids."""
        return self.centroids.nbytes

    @cached_property
    def origin(self) -> Tensor:
        """The centroids' mean, float32 (dim,): distances are measured from there, so that no digits are lost."""
        return self.centroids.to(torch.float64).mean(0).to(torch.float32)

    @classmethod
    def trained(cls, x: Tensor, count: int, seed: int) -> Lists:
        """Return centroids of float32 vectors (n, dim), by k-means.

        Raises
        ------
        CodecConfigError
            If there are fewer vectors than lists.
        """
        if len(x) < count:
            raise CodecConfigError(f"index: {count} lists need as many vectors to be trained on, found {len(x)}; train "
                                   "on more, or ask for fewer lists")
        exponent = exponent_of(x)
        found = kmeans(times_power(x, -exponent)[None], count, iterations=ITERATIONS, seed=seed)[0]
        return cls(times_power(found, exponent).contiguous())

    def of(self, x: Tensor) -> Tensor:
        """Return each vector's list, int64 (n,)."""
        exponent = max(exponent_of(x), exponent_of(self.centroids))
        unit, near = (times_power(one, -exponent)[None] for one in (x, self.centroids))
        return assign(unit, near)[0]

    def probed(self, queries: Tensor, count: int, metric: str) -> Tensor:
        """Return which lists each query looks into: bool (n, lists), the `count` nearest or of largest product."""
        scores = self.products(queries, metric == "l2")
        if metric == "l2":
            scores = scores - (self.centroids - self.origin).to(torch.float64).square().sum(1) / 2
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        return chosen.scatter_(1, scores.topk(min(count, len(self)), dim=1).indices, value=True)

    def products(self, queries: Tensor, around: bool) -> Tensor:
        """Return the products of queries with centroids, less the origin or not, float64 (n, lists)."""
        held = self.centroids - self.origin if around else self.centroids
        return products(queries, held.T)


def products(queries: Tensor, matrix: Tensor) -> Tensor:
    """Return `queries @ matrix`, float64, of float32 numbers: on a device summed so, whatever torch lets it round."""
    if queries.device.type == "cpu":
        return (queries @ matrix).to(torch.float64)
    return queries.to(torch.float64) @ matrix.to(torch.float64)
