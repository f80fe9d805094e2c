"""The scan on the processor: queries in bit planes, addresses, threads."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tersor.ops.sign_scan.kernels.scan import scan, sums_of
from tersor.ops.sign_scan.shapes import GROUP, RUN, SLACK, TILE, WORD, planes_of, words_of

if TYPE_CHECKING:
    from tersor.ops.sign_scan import Lines

LEAST_WORK = 1 << 23  # bits of rows times queries that are worth a thread: some tenths of a millisecond
_BYTES = 4  # of a word and of a factor


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Queries as the kernel takes them, as arrays; see `scan`."""

    planes: np.ndarray
    lines: np.ndarray
    sums: np.ndarray

    def __len__(self) -> int:
        return len(self.planes)

    def part(self, some: slice) -> _Queries:
        """Return some of them."""
        return _Queries(self.planes[some], self.lines[some], self.sums[some])


def best(lines: Lines, products: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows, (queries, k); see the op."""
    queries = _prepared(lines.peaks, products.numpy(), weights.numpy(), k)
    pieces, words = lines.places, words_of(products.shape[1])
    shares = _shares(pieces, queries, words)
    if len(shares) == 1:
        found = [_scanned(shares[0], words, k)]
    else:
        with ThreadPoolExecutor(len(shares)) as pool:
            found = list(pool.map(lambda share: _scanned(share, words, k), shares))
    if len(shares) > 1 and len(shares[0][1]) < len(queries):  # queries were shared out
        scores, ids = (np.concatenate(part) for part in zip(*found, strict=True))
    else:
        scores, ids = (np.concatenate(part, 1) for part in zip(*found, strict=True))
    order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -scores))[:, :k]
    return (torch.from_numpy(np.take_along_axis(scores, order, 1)),
            torch.from_numpy(np.take_along_axis(ids, order, 1)))


def _prepared(peaks: tuple[float, float], products: np.ndarray, weights: np.ndarray, k: int) -> _Queries:
    """Return queries rounded to integers of so many bits, as planes, and what rounding may move a score by."""
    count, bits = products.shape
    words, planes = words_of(bits), planes_of(bits, k)
    wide = np.zeros((count, words * WORD))
    wide[:, :bits] = products
    top = (1 << planes - 1) - 1
    step = np.abs(wide).max(1, initial=0.0) / top
    whole = np.rint(wide / np.where(step > 0, step, 1.0)[:, None])
    size, wrong = np.abs(wide).sum(1), np.abs(wide - whole * step[:, None]).sum(1)
    steepest, highest = peaks
    slack = SLACK * (4 * steepest * (size + wrong) + highest * np.abs(weights))
    lines = np.stack([2 * step, wrong - step * whole.sum(1), weights, slack], 1)
    held = whole.astype(np.int64)
    cut = np.stack([np.packbits((held >> plane & 1).astype(np.uint8), axis=1, bitorder="little").view("<u4")
                    for plane in range(planes)], 2).astype(np.uint32)
    sums = np.empty((count, words * WORD // RUN, 1 << RUN))
    sums_of(wide, sums)
    return _Queries(np.ascontiguousarray(cut.reshape(count, words, -1, GROUP).transpose(0, 2, 1, 3)), lines, sums)


def _shares(pieces: np.ndarray, queries: _Queries, words: int) -> list[tuple[np.ndarray, _Queries]]:
    """Return the work of every thread: some queries and all rows, or, of few queries, some rows."""
    total = int(pieces[:, 3].sum())
    count = max(1, min(torch.get_num_threads(), total * words * WORD * len(queries) // LEAST_WORK))
    if count == 1:
        return [(pieces, queries)]
    if len(queries) >= 2 * count:
        edges = [i * len(queries) // count for i in range(count + 1)]
        return [(pieces, queries.part(slice(*edge))) for edge in itertools.pairwise(edges)]
    edges = [-(-i * total // count // TILE) * TILE for i in range(count)] + [total]
    return [(_between(pieces, *edge, words), queries) for edge in itertools.pairwise(edges) if edge[1] > edge[0]]


def _between(pieces: np.ndarray, first: int, last: int, words: int) -> np.ndarray:
    """Return the pieces of rows `first` to `last`, in whole tiles of each piece."""
    found, start = [], 0
    for held, factors, offsets, count, number in pieces.tolist():
        low = -(-max(0, first - start) // TILE) * TILE
        high = min(count, -(-max(0, last - start) // TILE) * TILE)
        if high > low:
            found.append((held + low * words * _BYTES, factors + low * _BYTES, offsets + low * _BYTES, high - low,
                          number + low))
        start += count
    return np.array(found, np.int64).reshape(-1, 5)


def _scanned(share: tuple[np.ndarray, _Queries], words: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return heaps of the best, scores and ids."""
    pieces, queries = share
    scores, ids = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1, np.int64)
    scan(pieces, (queries.planes, queries.lines, queries.sums), words, (scores, ids))
    return scores, ids
