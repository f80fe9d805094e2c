"""k-means in pure torch, batched over groups: what product quantization fits its codebooks with.

Lloyd's algorithm (Lloyd 1957; IEEE Trans. Inf. Theory 28, 1982) from a seeded sample of the points, or from k-means++
(Arthur and Vassilvitskii, SODA 2007); by mini-batches (Sculley, WWW 2010) where there are too many points for that.
Distances come from matrix products in chunks, so that memory stays bounded. Knows nothing of codecs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError

Numbers = TypeVar("Numbers", Tensor, np.ndarray)
ITERATIONS = 20  # as published: scipy's kmeans2 with minit="points" and 20 iterations
INITS = ("sample", "kmeans++")
ENGINES = ("torch", "faiss")
CACHE_FLOATS = 1 << 19  # scores at a time on a processor: they stay inside its cache
DEVICE_FLOATS = 1 << 24  # scores at a time elsewhere


def kmeans(points: Tensor, words: int, *, iterations: int = ITERATIONS, seed: int = 0, init: str = "sample",
           batch: int | None = None, weights: Tensor | None = None, engine: str = "torch") -> Tensor:
    """Return centroids, float32 (groups, words, dim), of points (groups, n, dim); each group on its own.

    Lloyd's objective, the (weighted) sum of squared distances to the nearest centroid, never rises from one iteration
    to the next. A cluster that has lost all its points takes over a point that is worst served.

    Parameters
    ----------
    points : Tensor
        (groups, n, dim), any float dtype, of magnitudes whose squares float32 holds.
    words : int
        Centroids a group, 1 to n.
    iterations : int
        Upper bound; an iteration that changes no assignment is the last.
    seed : int
        Of the start and of the batches; every group starts from the same positions.
    init : str
        `"sample"`: distinct points at random; `"kmeans++"`: each next one drawn in proportion to its squared distance.
    batch : int or None
        Points of each iteration; None: all of them.
    weights : Tensor or None
        Non-negative, broadcastable to `points`: a weight a point, a dimension, or both. Of no unit.
    engine : str
        `"torch"`, or `"faiss"` where the package faiss is installed: faster, unweighted, start and batches its own.

    Raises
    ------
    CodecConfigError
        If there are fewer points than words, an argument is out of range, or faiss is asked for and missing.
    """
    _check(points, words, iterations, init, batch, engine)
    if engine == "faiss":
        return _faiss(points, words, iterations, seed, weights)
    generator = torch.Generator().manual_seed(seed)
    centre = points.mean(1, keepdim=True, dtype=torch.float64).to(torch.float32)
    # far from the origin a distance made of products cancels
    centred = (points.to(torch.float32) - centre).contiguous()
    # one weight a point does not move the nearest centroid, so the search may ignore it
    metric = weights if weights is not None and weights.shape[-1] > 1 else None
    if init == "sample":
        chosen = torch.randperm(points.shape[1], generator=generator)[:words]
        centroids = centred[:, chosen.to(points.device)]
    else:
        centroids = _plus_plus(centred, words, generator, weights)
    if batch is not None and batch < points.shape[1]:
        return _mini_batches(centred, centroids, weights, iterations, batch, generator) + centre
    before: Tensor | None = None
    for _ in range(iterations):
        codes = _nearest(centred, centroids, metric)
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        sums, masses = _totals(centred, codes, weights, words)
        moved = torch.where(masses > 0, sums / torch.where(masses > 0, masses, torch.ones_like(masses)), centroids)
        centroids = _repair(centred, codes, centroids, moved, weights)
    return centroids + centre


def assign(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the nearest centroid of every point, int64 (groups, n); of equals, the lowest.

    Parameters
    ----------
    points : Tensor
        (groups, n, dim).
    centroids : Tensor
        (groups, words, dim), or (1, words, dim) for all groups.
    weights : Tensor or None
        As in `kmeans`.
    """
    centre = centroids.mean(1, keepdim=True, dtype=torch.float64).to(torch.float32)
    metric = weights if weights is not None and weights.shape[-1] > 1 else None
    wide = (centroids.to(torch.float32) - centre).expand(points.shape[0], -1, -1)
    return _nearest((points.to(torch.float32) - centre).contiguous(), wide, metric)


def exponent_of(values: Tensor) -> int:
    """Return e so that `2**-e` brings the largest magnitude into [.5, 1), and squares into range; 0 for zeros."""
    return math.frexp(max(float(values.max()), -float(values.min())))[1]


def times_power(values: Numbers, exponent: int) -> Numbers:
    """Return `values * 2**exponent`; in two steps where the power alone exceeds float32."""
    if -126 <= exponent <= 127:
        return values * 2.0**exponent
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def _check(points: Tensor, words: int, iterations: int, init: str, batch: int | None, engine: str) -> None:
    if points.ndim != 3 or not points.shape[2]:
        raise CodecConfigError(f"k-means needs points of shape (groups, n, dim), found {tuple(points.shape)}")
    if not isinstance(words, int) or not 1 <= words <= points.shape[1]:
        raise CodecConfigError(f"k-means cannot make {words!r} clusters of {points.shape[1]} points; it needs at least "
                               "one point a cluster: use fewer words or more samples")
    if not isinstance(iterations, int) or iterations < 0:
        raise CodecConfigError(f"k-means: iterations must be an integer >= 0, found {iterations!r}")
    if init not in INITS:
        raise CodecConfigError(f"k-means: init must be one of {INITS}, found {init!r}")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise CodecConfigError(f"k-means: batch must be a positive integer or None, found {batch!r}")
    if engine not in ENGINES:
        raise CodecConfigError(f"k-means: engine must be one of {ENGINES}, found {engine!r}")


def _nearest(points: Tensor, centroids: Tensor, metric: Tensor | None) -> Tensor:
    """Return the lowest nearest centroid, int64 (groups, n); float32 tensors near the origin.

    `Σ w (x - c)²` less the part that no centroid changes is the scalar product of (w x, w) with (-2 c, c²); where
    all points have the same w, of (x, 1) with (-2 w c, Σ w c²).
    """
    groups, count, _ = points.shape
    words = centroids.shape[1]
    shared = metric is None or metric.shape[-2] == 1
    scaled = centroids if metric is None or not shared else centroids * metric
    square = (scaled * centroids).sum(-1, keepdim=True) if shared else centroids.square()
    keys = torch.cat([-2.0 * scaled, square], -1).transpose(1, 2)
    order = torch.arange(words, dtype=torch.float32, device=points.device)  # exact: words <= 65,536 < 2**24
    ones = torch.ones_like(order)
    codes = torch.empty(groups, count, dtype=torch.int64, device=points.device)
    for group, part in _chunks(groups, count, words, points.device):
        some = points[group, part]
        tail = torch.ones_like(some[..., :1])
        if metric is not None and not shared:
            tail = metric.expand(points.shape)[group, part]
            some = some * tail
        scores = (torch.cat([some, tail], -1) @ keys[group]).reshape(-1, words)
        found = _lowest(scores, order, ones)
        codes[group, part] = found.reshape(codes[group, part].shape)
    return codes


def _lowest(scores: Tensor, order: Tensor, ones: Tensor) -> Tensor:
    """Return `scores.argmin(-1)`: the sum of the positions of the least, which is the position where there is one.

    Several times faster than argmin on a processor, which vectorizes minima and products but not arguments.
    """
    least = torch.eq(scores, scores.amin(-1, keepdim=True), out=torch.empty_like(scores))
    found = torch.mv(least, order).to(torch.int64)
    unclear = (torch.mv(least, ones) != 1).nonzero().squeeze(-1)
    if unclear.numel():
        found[unclear] = scores[unclear].argmin(-1)
    return found


def _chunks(groups: int, count: int, words: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield slices of groups and points whose scores are bounded in number; the same whatever the block sizes."""
    limit = CACHE_FLOATS if device.type == "cpu" else DEVICE_FLOATS
    points = max(16, limit // words)
    together = max(1, points // max(1, count))
    for first in range(0, groups, together):
        for start in range(0, count, points):
            yield slice(first, min(first + together, groups)), slice(start, min(start + points, count))


def _totals(points: Tensor, codes: Tensor, weights: Tensor | None, words: int) -> tuple[Tensor, Tensor]:
    """Return the weighted sums (groups, words, dim) and the weights (groups, words, 1 or dim) of every cluster."""
    groups, _, dim = points.shape
    place = (codes + torch.arange(groups, device=codes.device).unsqueeze(-1) * words).reshape(-1)
    weighted = points if weights is None else points * weights
    sums = torch.zeros(groups * words, dim, dtype=torch.float32, device=points.device)
    sums.index_add_(0, place, weighted.reshape(-1, dim))
    if weights is None:
        return sums.reshape(groups, words, dim), torch.bincount(place, minlength=groups * words).to(
            torch.float32).reshape(groups, words, 1)
    kind = weights.shape[-1]
    spread = weights.to(torch.float32).expand(groups, points.shape[1], kind).reshape(-1, kind)
    masses = torch.zeros(groups * words, kind, dtype=torch.float32, device=points.device).index_add_(0, place, spread)
    return sums.reshape(groups, words, dim), masses.reshape(groups, words, kind)


def _repair(points: Tensor, codes: Tensor, centroids: Tensor, moved: Tensor, weights: Tensor | None) -> Tensor:
    """Give every empty cluster one of the worst-served points of its group; return `moved` with them in place."""
    groups, words = moved.shape[:2]
    place = codes + torch.arange(groups, device=codes.device).unsqueeze(-1) * words
    empty = (torch.bincount(place.reshape(-1), minlength=groups * words) == 0).reshape(groups, words)
    for group in empty.any(-1).nonzero().squeeze(-1).tolist():
        vacant = empty[group].nonzero().squeeze(-1)
        own = weights if weights is None or weights.shape[0] == 1 else weights[group : group + 1]
        served = moved[group : group + 1, codes[group]]
        cost = _cost(points[group : group + 1], served, own).reshape(-1)
        worst = torch.sort(cost, descending=True, stable=True).indices[: vacant.numel()]
        useful = cost[worst] > 0  # fewer distinct points than words: the rest of the words stay idle
        moved[group, vacant[useful]] = points[group, worst[useful]]
        moved[group, vacant[~useful]] = centroids[group, vacant[~useful]]
    return moved


def _cost(points: Tensor, served: Tensor, weights: Tensor | None) -> Tensor:
    squares = (points - served).square()
    return (squares if weights is None else squares * weights).sum(-1)


def _plus_plus(points: Tensor, words: int, generator: torch.Generator, weights: Tensor | None) -> Tensor:
    """Return the k-means++ start: after a first point, each next one in proportion to its cost so far."""
    groups, count, _ = points.shape
    draws = torch.rand(words, groups, 1, generator=generator, dtype=torch.float64).to(points.device)
    every = torch.arange(groups, device=points.device)
    chosen = (draws[0, :, 0] * count).to(torch.int64).clamp_max(count - 1)
    found, cost = [points[every, chosen]], torch.full((groups, count), torch.inf, device=points.device,
                                                      dtype=torch.float32)
    for draw in draws[1:]:
        cost = torch.minimum(cost, _cost(points, found[-1].unsqueeze(1), weights))
        total = cost.to(torch.float64).cumsum(-1)
        chosen = torch.searchsorted(total, draw * total[:, -1:], right=True).squeeze(-1).clamp_max(count - 1)
        found.append(points[every, chosen])
    return torch.stack(found, 1)


def _mini_batches(points: Tensor, centroids: Tensor, weights: Tensor | None, iterations: int, batch: int,
                  generator: torch.Generator) -> Tensor:
    """Return centroids after `iterations` batches, each centroid the mean of all that it was ever given."""
    metric = weights if weights is not None and weights.shape[-1] > 1 else None
    given = torch.zeros(1, dtype=torch.float32, device=points.device)
    for _ in range(iterations):
        chosen = torch.randint(points.shape[1], (batch,), generator=generator).to(points.device)
        some = points[:, chosen]
        own = weights if weights is None or weights.shape[-2] == 1 else weights[:, chosen]
        near = metric if metric is None or metric.shape[-2] == 1 else metric[:, chosen]
        sums, masses = _totals(some, _nearest(some, centroids, near), own, centroids.shape[1])
        given = given + masses
        step = torch.where(given > 0, 1.0 / torch.where(given > 0, given, torch.ones_like(given)),
                           torch.zeros_like(given))
        centroids = centroids + (sums - masses * centroids) * step
    return centroids


def _faiss(points: Tensor, words: int, iterations: int, seed: int, weights: Tensor | None) -> Tensor:
    if weights is not None:
        raise CodecConfigError("k-means: the faiss engine knows no weights; use engine='torch' with a Hessian")
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise CodecConfigError("k-means: engine='faiss' needs the package faiss: pip install faiss-cpu, or use "
                               "engine='torch'") from error
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # the order of its sums, and so the bytes, depend on the threads
    try:
        found = []
        for group in points.to(torch.float32).cpu():
            engine = faiss.Kmeans(group.shape[1], words, niter=iterations, seed=seed,
                                  max_points_per_centroid=group.shape[0], min_points_per_centroid=1)
            engine.train(group.contiguous().numpy())
            found.append(torch.from_numpy(engine.centroids.copy()))
    finally:
        faiss.omp_set_num_threads(threads)
    return torch.stack(found).to(points.device)
