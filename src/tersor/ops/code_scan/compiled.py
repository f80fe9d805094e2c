"""The scan on the processor: queries' tables in bytes, whose turn it is where, threads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tersor.ops import workers
from tersor.ops.code_scan.kernels.alone import alone
from tersor.ops.code_scan.kernels.heaps import sort_best
from tersor.ops.code_scan.kernels.scan import scan
from tersor.ops.code_scan.kernels.tables import rounded, sum_signs
from tersor.ops.code_scan.kernels.words import scan_words
from tersor.ops.code_scan.shapes import BYTE, EDGES, FLOOR, LEAST_WORK, LINE, METRICS, NIBBLE, TILE, columns_of

if TYPE_CHECKING:
    from tersor.ops.code_scan import Alone, Asked, Lines

ROOM = 1024  # rows within a floor that there is room for at first
_FLOAT, _LONG, _EDGES = 4, 8, 8 * EDGES


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Queries as the kernel takes them, as arrays; see `scan`."""

    rough: np.ndarray
    lines: np.ndarray
    tables: np.ndarray

    def __len__(self) -> int:
        return len(self.tables)


@dataclasses.dataclass(frozen=True)
class _Share:
    """The work of a thread: pieces, and who visits them; see `scan`."""

    pieces: np.ndarray
    starts: np.ndarray
    who: np.ndarray
    terms: np.ndarray


def best(lines: Lines, asked: Asked, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the best rows, (queries, k); see the op."""
    queries = _prepared(lines, asked, None)
    shares = _shares(lines, asked, queries)
    scores = np.full((len(shares), len(queries), k), -np.inf)
    ids = np.full((len(shares), len(queries), k), np.iinfo(np.int64).max)
    none = np.empty((len(queries), 0), np.int64)
    columns, whole = lines.pieces[0].codes.shape[1], asked.visits is None and asked.masks is None
    _run(shares, lambda place: _scan(shares[place], queries, columns, (scores[place], ids[place], none), whole))
    flat, numbers = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    sort_best(scores, ids, flat, numbers)
    return torch.from_numpy(flat), torch.from_numpy(numbers)


def one_nearest(lines: Lines, query: Tensor, how: Alone, k: int) -> tuple[Tensor, Tensor] | None:
    """Return distances or scores, and ids, of the best rows, (1, k); see the op."""
    found = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
    kind = how.size, METRICS.index(how.metric)
    if not alone(np.ascontiguousarray(query.numpy()), how.mean, how.matrix, kind, lines.places, lines.peaks,
                 lines.pieces[0].codes.shape[1], found):
        return None
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def signed_sums(products: Tensor) -> Tensor:
    """Return tables of four signs' sums; see the op."""
    found = np.empty((len(products), 2 * columns_of(products.shape[1]), NIBBLE))
    sum_signs(products.numpy(), found)
    return torch.from_numpy(found)


def within(lines: Lines, asked: Asked, floors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the scores and ids of all rows from a floor on; see the op."""
    queries = _prepared(lines, asked, floors.numpy())
    shares = _shares(lines, asked, queries)
    columns, parts = lines.pieces[0].codes.shape[1], [_Found(queries) for _ in shares]
    _run(shares, lambda place: parts[place].fill(shares[place], columns))
    out = []
    for query in range(len(queries)):
        scores, ids = (np.concatenate([part.of(query)[i] for part in parts]) for i in range(2))
        order = np.lexsort((ids, -scores))
        out.append((torch.from_numpy(scores[order]), torch.from_numpy(ids[order])))
    return out


class _Found:
    """What a thread has found within floors; room grows until all fit."""

    def __init__(self, queries: _Queries) -> None:
        self.queries, self.room = queries, ROOM

    def fill(self, share: _Share, columns: int) -> None:
        """Scan, once more where there was no room."""
        while True:
            shape = len(self.queries), self.room
            self.scores, self.ids = np.empty(shape), np.empty(shape, np.int64)
            self.counts = np.zeros((len(self.queries), 1), np.int64)
            _scan(share, self.queries, columns, (self.scores, self.ids, self.counts))
            most = int(self.counts.max(initial=0))
            if most <= self.room:
                return
            self.room = most

    def of(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and ids of a query."""
        count = int(self.counts[query, 0])
        return self.scores[query, :count], self.ids[query, :count]


def _prepared(lines: Lines, asked: Asked, floors: np.ndarray | None) -> _Queries:
    """Return queries with tables rounded to bytes, and what rounding may move a score by."""
    tables, weights = np.ascontiguousarray(asked.tables.numpy()), asked.weights.numpy()
    count, _, size = tables.shape
    held, rough = np.empty((count, LINE)), np.empty(tables.shape if size <= BYTE else (count, 0, 0), np.uint8)
    held[:, FLOOR] = -np.inf if floors is None else floors
    rounded(tables, 2 if size == NIBBLE else 1, weights, lines.peaks, rough, held)
    return _Queries(rough, held, tables)


def _shares(lines: Lines, asked: Asked, queries: _Queries) -> list[_Share]:
    """Return the work of every thread: some of the queries in all pieces, or, of one or of few, some rows."""
    pieces = lines.places
    if asked.masks is not None:
        pieces = pieces.copy()
        pieces[:, 5] = [mask.data_ptr() for mask in asked.masks]
    if asked.visits is None and asked.bases is None and asked.weights.shape[1] == 1:
        plain = _plain(pieces, asked, queries, lines)
        if plain is not None:
            return [plain]
    visits = np.ones((len(queries), len(pieces)), bool) if asked.visits is None else asked.visits.numpy()
    bases = np.zeros(visits.shape) if asked.bases is None else asked.bases.numpy()
    terms = np.stack([bases, np.broadcast_to(asked.weights.numpy(), visits.shape)], 2)
    nbytes = int(visits.sum(0) @ pieces[:, 4]) * lines.pieces[0].codes.shape[1]
    threads = max(1, min(torch.get_num_threads(), nbytes // LEAST_WORK))
    if threads == 1:
        return [_share(pieces, visits, terms, 0)]
    if len(queries) >= 2 * threads:
        edges = [i * len(queries) // threads for i in range(threads + 1)]
        return [_share(pieces, visits[a:b], terms[a:b], a) for a, b in itertools.pairwise(edges)]
    return [_share(*part, 0) for part in _cut(pieces, visits, terms, lines, threads)]


def _plain(pieces: np.ndarray, asked: Asked, queries: _Queries, lines: Lines) -> _Share | None:
    """Return the work of one thread where all queries look at all rows alike; None where that is too much for one."""
    count = len(queries)
    if torch.get_num_threads() > 1:
        nbytes = int(pieces[:, 4].sum()) * count * lines.pieces[0].codes.shape[1]
        if nbytes >= 2 * LEAST_WORK:
            return None
    starts, terms = np.zeros((len(pieces), 2), np.int64), np.zeros((count, 2))
    starts[:, 1], terms[:, 1] = count, asked.weights.numpy()[:, 0]
    return _Share(pieces, starts, np.arange(count), terms)


def _share(pieces: np.ndarray, visits: np.ndarray, terms: np.ndarray, first: int) -> _Share:
    """Return whose turn it is in every piece that anybody visits; nearest pieces first, where bases say so."""
    places = np.flatnonzero(visits.any(0))
    if len(places) > 1:
        best_of = np.where(visits[:, places], terms[:, places, 0], -np.inf).max(0)
        places = places[np.argsort(-best_of, kind="stable")]
    inside = visits[:, places].T
    place, who = np.nonzero(inside)
    stops = np.cumsum(inside.sum(1), dtype=np.int64)
    starts = np.stack([np.concatenate([[0], stops[:-1]]), stops], 1)
    return _Share(pieces[places], starts, who + first, terms[who, places[place]])


def _cut(pieces: np.ndarray, visits: np.ndarray, terms: np.ndarray, lines: Lines,
         threads: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the pieces cut for threads, in whole tiles, with who visits them."""
    tile = TILE * lines.pieces[0].codes.shape[1] * lines.pieces[0].codes.element_size()
    total = int(pieces[:, 4].sum())
    edges = [-(-i * total // threads // TILE) * TILE for i in range(threads)] + [total]
    found = []
    for first, last in itertools.pairwise(edges):
        places, rows, start = [], [], 0
        for place, (codes, factors, offsets, ids, count, mask, edges) in enumerate(pieces.tolist()):
            low, high = (min(count, -(-max(0, edge - start) // TILE) * TILE) for edge in (first, last))
            if high > low:
                places.append(place)
                rows.append((codes + low // TILE * tile, factors + low * _FLOAT, offsets + low * _FLOAT,
                             ids + low * _LONG, high - low, mask + low if mask else 0,
                             edges + low // TILE * _EDGES))
            start += count
        if rows:
            found.append((np.array(rows, np.int64), visits[:, places], terms[:, places]))
    return found


def _scan(share: _Share, queries: _Queries, columns: int, found: tuple[np.ndarray, np.ndarray, np.ndarray],
          whole: bool = False) -> None:
    visits = share.starts, share.who, share.terms
    if queries.tables.shape[2] > BYTE:
        scan_words(share.pieces, visits, (queries.lines, queries.tables), columns, found)
    else:
        scan(share.pieces, visits, (queries.rough, queries.lines, queries.tables), columns, found, whole)


def _run(shares: Sequence[_Share], act: Callable[[int], object]) -> None:
    workers.share(len(shares), len(shares) * workers.LEAST, lambda span: [act(place) for place in range(*span)])
