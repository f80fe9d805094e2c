"""What is asked of an index: the nearest vectors, all near ones, and vectors themselves."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from tersor.contract.operator import like
from tersor.errors import CodecConfigError
from tersor.vectors import rowwise
from tersor.vectors.bounding import bounded, errors_at, reach
from tersor.vectors.checks import Ids, allowed_of, as_tensor, ids_of, integer, metric_of, radius_of, vectors_of
from tersor.vectors.held import Held
from tersor.vectors.nearest import WORST
from tersor.vectors.refining import Finer, refined
from tersor.vectors.scoring import CHUNK_QUERIES, Wanted, at_once, best_of, within
from tersor.vectors.state import State, nothing

CERTAIN = "certain"
MOST_K = 1 << 20  # where there are fewer vectors: what is beyond them is filled up
REFINED = 4  # vectors that are looked at once more, for each that is asked for


class Reader(State):
    """The verbs that change nothing."""

    def search(self, queries: Tensor | np.ndarray, k: SupportsIndex = 10, metric: str | None = None, *,
               filter: Ids | None = None, nprobe: SupportsIndex | None = None, refine: Finer | None = None,
               refine_k: SupportsIndex | str | None = None) -> tuple[Any, Any]:
        """Return the k best vectors of each query.

        The first search keeps the norms of the decoded vectors: 4 bytes a vector in memory, not stored.

        Parameters
        ----------
        queries : Tensor or ndarray
            (q, dim), any float dtype; computed in float32.
        k : int
        metric : str or None
            `"l2"`: squared distance, ascending; `"ip"`: scalar product, `"cosine"`: of unit vectors, both descending.
            None: that of the index.
        filter : array of bool, or ids
            What may be found: a mask of all vectors in the order of `ids`, or their ids.
        nprobe : int or None
            Lists that are looked into; None: `nprobe` of the index. Nothing without lists.
        refine : Tensor, ndarray, Index or None
            Scores are computed anew from the rows of this array, which ids number, or from another index.
        refine_k : int, "certain" or None
            Vectors that this is done for; None: four times k. `"certain"`: all that `bounds` leave a chance;
            with the originals the result is then exact, but for lists that were not looked into.

        Returns
        -------
        distances, ids : Tensor, or ndarray where the queries are one
            float32 and int64 (q, k). Of equal scores the lower id comes first. Where there are fewer than k, the id is
            -1 and the distance the largest float32 (the lowest, descending).

        Raises
        ------
        CodecConfigError
            If the index is empty, the width is not `dim`, or another argument is unsound.
        NonFiniteError
            If a query holds NaN, infinity or numbers beyond 2**50.
        """
        given, queries = queries, vectors_of(queries, self.dim).to(torch.float32)
        held, k = self._held, integer(k, "k", 1)
        self._check_filled(held)
        if k > max(MOST_K, held.count):
            raise CodecConfigError(f"index: k must be at most {MOST_K:,}, or the number of vectors, found {k}")
        wanted = self._wanted(held, metric, filter, nprobe)
        worst = WORST if wanted.metric == "l2" else -WORST
        if refine is None and refine_k is not None:
            raise CodecConfigError("index: refine_k says how many vectors refine= scores anew; give refine=, too")
        certain = isinstance(refine_k, str)
        if certain and refine_k != CERTAIN:
            raise CodecConfigError(f"index: refine_k must be an integer or '{CERTAIN}', found {refine_k!r}")
        first = k if refine is None or certain else max(
            k, integer(REFINED * k if refine_k is None else refine_k, "refine_k", 1))  # type: ignore[arg-type]
        distances, ids = _found(held, queries, first, wanted, worst)
        if certain:
            ids = _possible(held, queries, ids, wanted)
        if refine is not None:
            distances, ids = refined(queries, ids, k, wanted.metric, refine)
        return _answer(given, distances), _answer(given, ids)

    def bounds(self, queries: Tensor | np.ndarray, ids: Ids, metric: str | None = None) -> tuple[Any, Any]:
        """Return between what the true distances or scores of some vectors lie: those of the originals, not of codes.

        Bounds are certain. They need a codec that keeps errors, `"err,ctr8,rot,tr2"` for one: a byte a vector.

        Parameters
        ----------
        queries : Tensor or ndarray
            (q, dim).
        ids : array of int
            (q, m), as `search` returns them; -1 for none.
        metric : str or None
            As of `search`.

        Returns
        -------
        low, high : Tensor, or ndarray where the queries are one
            float64 (q, m): of squared distances, products or cosines; minus infinity and infinity where nothing is
            known, and for -1.

        Raises
        ------
        CodecConfigError
            If the codes keep no errors, shapes do not fit, or an id is not that of a vector.
        """
        given, queries, held = queries, vectors_of(queries, self.dim).to(torch.float32), self._held
        named = ids_of(ids)
        if named.ndim != 2 or len(named) != len(queries):
            raise CodecConfigError(f"index: ids must be (queries, m), {len(queries)} rows, found {tuple(named.shape)}")
        self._check_filled(held)
        chosen = self.metric if metric is None else metric_of(metric)
        low, high = (torch.full(named.shape, side, dtype=torch.float64) for side in (-math.inf, math.inf))
        for i, query in enumerate(queries):
            there = named[i] >= 0
            places = _places(held, named[i][there])
            decoded = held.points(places, self.dim)
            low[i, there], high[i, there] = bounded(query, decoded, errors_at(held, places), chosen)
        return _answer(given, low), _answer(given, high)

    def range_search(self, queries: Tensor | np.ndarray, radius: float, metric: str | None = None, *,
                     filter: Ids | None = None, nprobe: SupportsIndex | None = None) -> tuple[Any, Any, Any]:
        """Return all vectors whose squared distance is at most `radius`, or whose score is at least that.

        Parameters
        ----------
        queries : Tensor or ndarray
            (q, dim).
        radius : float
        metric, filter, nprobe
            As of `search`.

        Returns
        -------
        limits, distances, ids : Tensor, or ndarray where the queries are one
            int64 (q + 1,), float32 (n,) and int64 (n,): those of query i lie from `limits[i]` to `limits[i + 1]`, best
            first.
        """
        given, queries = queries, vectors_of(queries, self.dim).to(torch.float32)
        held = self._held
        self._check_filled(held)
        wanted = self._wanted(held, metric, filter, nprobe)
        radius = radius_of(radius, wanted.metric)
        found = [one for start in range(0, len(queries), CHUNK_QUERIES)
                 for one in within(held, queries[start : start + CHUNK_QUERIES], radius, wanted)]
        counts = torch.tensor([0, *(len(one) for one, _ in found)])
        distances = torch.cat([torch.empty(0), *(one for one, _ in found)])
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *(one for _, one in found)])
        return _answer(given, counts.cumsum(0)), _answer(given, distances), _answer(given, ids)

    def kneighbors(self, X: Tensor | np.ndarray, n_neighbors: SupportsIndex = 5,
                   return_distance: bool = True) -> Any:
        """Return what scikit-learn's `NearestNeighbors.kneighbors` returns: distances, ascending, and ids.

        Distances are Euclidean ones, not squared, or `1 - cosine`. Inner products are no distances.

        Raises
        ------
        CodecConfigError
            If the metric is `"ip"`, or there are fewer vectors than neighbours.
        """
        k = integer(n_neighbors, "n_neighbors", 1)
        if self.metric == "ip":
            raise CodecConfigError("index: inner products are no distances, which kneighbors returns; use search")
        if k > self.ntotal:
            raise CodecConfigError(f"index: expected n_neighbors <= {self.ntotal}, found {k}")
        found, ids = self.search(X, k)
        if not return_distance:
            return ids
        return (found**0.5 if self.metric == "l2" else 1 - found), ids

    def reconstruct(self, ids: Ids) -> Any:
        """Return the decoded vectors of `ids`, integers of any shape: float32 (*ids.shape, dim), an array for an array.

        Raises
        ------
        CodecConfigError
            If an id is not that of a vector, -1 included.
        """
        index, held = ids_of(ids), self._held.whole()
        flat = _places(held, index.reshape(-1))
        return like(ids, held.points(flat, self.dim).reshape(*index.shape, self.dim))

    def sa_decode(self, codes: Tensor | np.ndarray) -> Any:
        """Return the vectors of stand-alone codes, uint8 (n, code_size): float32 (n, dim), an array for an array.

        Raises
        ------
        CodecConfigError
            If the index is not trained, has lists, or dtype or shape are not those of codes.
        CorruptStoreError
            If the codes decode to NaN or infinity.
        """
        held = self._held
        self._check_alone(held)
        given, codes = codes, as_tensor(codes, "codes").cpu()
        if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != self.code_size:
            raise CodecConfigError(f"index: codes must be uint8 (n, {self.code_size}), found {codes.dtype} "
                                   f"{tuple(codes.shape)}")
        out = torch.empty(len(codes), self.dim)
        for start in range(0, len(codes), self._rows):
            part = codes[start : start + self._rows]
            encoded = rowwise.from_bytes(part, self.codec, self.dim, held.tables)
            out[start : start + len(part)] = encoded.check("codes").decode()
        return like(given, out)

    def _check_alone(self, held: Held) -> None:
        self._check_trained(held)
        if self.nlist:
            raise CodecConfigError("index: a code says nothing without its list; use an index without lists for "
                                   "stand-alone codes")

    def _wanted(self, held: Held, metric: str | None, allowed: Ids | None, nprobe: SupportsIndex | None) -> Wanted:
        probes = self._nprobe if nprobe is None else integer(nprobe, "nprobe", 1)
        chosen = self.metric if metric is None else metric_of(metric)
        let = allowed_of(allowed, held.ids) if allowed is not None else None
        return Wanted(chosen, let, probes, self._device)


def _answer(queries: Any, found: Tensor) -> Any:
    """Return what was found as the queries are: an array for an array, else a tensor on their device."""
    return like(queries, found.to(queries.device) if isinstance(queries, Tensor) else found)


def _found(held: Held, queries: Tensor, k: int, wanted: Wanted, worst: float) -> tuple[Tensor, Tensor]:
    """Return distances and ids of the best vectors, (queries, k); the worst distance and -1 where there are fewer."""
    most_queries = at_once(held, wanted)
    if k <= held.count and 0 < len(queries) <= most_queries:
        return best_of(held, queries, k, wanted)
    distances, ids = nothing(len(queries), k, worst)
    most = min(k, held.count)
    for start in range(0, len(queries), most_queries):
        part = slice(start, start + most_queries)
        distances[part, :most], ids[part, :most] = best_of(held, queries[part], most, wanted)
    return distances, ids


def _places(held: Held, ids: Tensor) -> Tensor:
    """Return the places of ids, int64 (n,), each that of a vector."""
    found = held.places_of(ids)
    if bool((found < 0).any()):
        missing = ids[found < 0]
        hint = "; -1 in a search result stands for no vector" if int(missing.min()) == -1 else ""
        raise CodecConfigError(f"index: ids must be those of its {held.count} vectors, found {int(missing[0])}{hint}")
    return found


def _possible(held: Held, queries: Tensor, ids: Tensor, wanted: Wanted) -> Tensor:
    """Return the ids that may be among the best for all that bounds say, int64 (queries, m), -1 behind them.

    Of `ids` (queries, k), the best by their codes, bounds say how good the k-th best is at least.
    """
    if wanted.metric == "cosine":
        raise CodecConfigError(f"index: refine_k='{CERTAIN}' takes the metrics 'l2' and 'ip'; for cosines add vectors "
                               "of length 1 and use 'ip'")
    every = errors_at(held, torch.arange(held.count))
    rows = []
    for query, row in zip(queries, ids, strict=True):
        places = _places(held, row[row >= 0])
        if len(places) < ids.shape[1] or not bool(torch.isfinite(every).all()):
            allowed = held.ids if wanted.allowed is None else held.ids[wanted.allowed]
            rows.append(allowed)  # any may be
            continue
        low, high = bounded(query, held.points(places, len(query)), every[places], wanted.metric)
        worst = float(low.min() if wanted.metric == "ip" else high.max())
        radius = reach(query, worst, float(every.max()), wanted.metric)
        found = within(held, query[None], radius, wanted)[0][1]
        places = held.places_of(found)
        low, high = bounded(query, held.points(places, len(query)), every[places], wanted.metric)
        rows.append(found[high >= worst] if wanted.metric == "ip" else found[low <= worst])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
