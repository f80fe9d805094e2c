"""An index tried on vectors: recall, bytes and speed, beside FAISS where it is installed. One thread each."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.vectors.checks import CPU
from tersor.vectors.index import Index
from tersor.vectors.nearest import Best

HELD_OUT = 1000  # queries that are drawn from the vectors where none are given
FEW = 20  # queries that are put one by one
MOST_QUERIES = 1000
BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one method reached.

    Attributes
    ----------
    method : str
    nbytes : float
        Stored a vector, tables included.
    recall : float
        Mean share of the true k nearest among the k found.
    batch, single : float
        Queries a second: all at once, and one by one. Of processor time; of the clock's, where a GPU searches.
    build : float
        Seconds to train and to add.
    """

    method: str
    nbytes: float
    recall: float
    batch: float
    single: float
    build: float


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def held_out(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return vectors without some that are drawn from them, and those as queries."""
    count = min(HELD_OUT, len(x) // 10)
    if count < 1:
        raise CodecConfigError(f"bench: expected at least 10 vectors to draw queries from, found {len(x)}; give "
                               "queries")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[count:].sort().values], x[order[:count]]


def exact(x: Tensor, queries: Tensor, k: int, metric: str) -> Tensor:
    """Return the true ids, int64 (q, k), from float32 vectors."""
    if metric == "cosine":
        x, queries = (torch.nn.functional.normalize(one, dim=1) for one in (x, queries))
    if metric == "l2":
        mean = x.mean(0)
        x, queries = x - mean, queries - mean
    best = Best(len(queries), k)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        scores = queries @ part.T
        scores = scores - part.square().sum(1) / 2 if metric == "l2" else scores
        best.offer(scores, torch.arange(start, start + len(part)))
    return best.ids


def recall(found: Tensor, truth: Tensor) -> float:
    """Return the mean share of the true ids that were found."""
    return float((found.unsqueeze(2) == truth.unsqueeze(1)).any(1).float().mean())


def tried(index: Index, x: Tensor, queries: Tensor, truth: Tensor) -> Trial:
    """Fill an index, which is empty, and measure it."""
    clock = time.process_time if index.device == CPU else time.perf_counter
    build, _ = _timed(lambda: (index.train(x), index.add(x)), clock)
    k = truth.shape[1]
    ids, batch, single = _speeds(lambda some: torch.as_tensor(index.search(some, k)[1]), queries.numpy(), clock)
    lists = f"IVF{index.nlist}," if index.nlist else ""
    return Trial(f"{lists}{index.codec}", index.nbytes / len(x), recall(ids, truth), batch, single, build)


def beside(x: Tensor, queries: Tensor, truth: Tensor, nbytes: int, metric: str) -> Iterator[Trial]:
    """Yield FAISS' product codes and RaBitQ of at most so many bytes a vector; nothing where it is not installed.

    Product codes need as many vectors as words.
    """
    if importlib.util.find_spec("faiss") is None:
        return
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    wide, asked = x.numpy(), queries.numpy()
    if metric == "cosine":
        wide, asked = (torch.nn.functional.normalize(one, dim=1).numpy() for one in (x, queries))
    for name, make in _peers(faiss, x.shape, nbytes, faiss.METRIC_L2 if metric == "l2" else
                             faiss.METRIC_INNER_PRODUCT):
        made = make()
        build, _ = _timed(lambda made=made: (made.train(wide), made.add(wide)))
        k = truth.shape[1]
        ids, batch, single = _speeds(lambda some, made=made, k=k: torch.from_numpy(made.search(some, k)[1]), asked)
        empty = faiss.clone_index(made)
        empty.reset()
        total = made.sa_code_size() + len(faiss.serialize_index(empty)) / len(x)
        yield Trial(f"FAISS {name}", total, recall(ids, truth), batch, single, build)


def _peers(faiss: Any, shape: Sequence[int], nbytes: int, metric: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    count, dim = shape
    for name, bits in (("PQ{}x8np", 8), ("PQ{}x4fs", 4)):
        groups = max((m for m in range(1, dim + 1) if dim % m == 0 and m * bits <= 8 * nbytes), default=0)
        if groups and count >= 1 << bits:  # FAISS trains no more words than there are vectors
            full = name.format(groups)
            yield full, lambda full=full: faiss.index_factory(dim, full, metric)
    fitting = None
    for bits in range(1, 9):
        code = faiss.IndexRaBitQ(dim, metric, bits)
        if code.sa_code_size() <= nbytes:
            fitting = bits
    if fitting:
        yield f"rotated RaBitQ, {fitting} bits", lambda: faiss.IndexPreTransform(
            faiss.RandomRotationMatrix(dim, dim), faiss.IndexRaBitQ(dim, metric, fitting))


def _speeds(search: Callable[[np.ndarray], Tensor], queries: np.ndarray,
            clock: Callable[[], float] = time.process_time) -> tuple[Tensor, float, float]:
    """Return what is found, and queries a second in a batch and one by one."""
    search(queries[:1])  # what the first search prepares
    seconds, ids = _timed(lambda: search(queries), clock)
    again, _ = _timed(lambda: search(queries), clock)
    few = queries[:FEW]
    one, _ = _timed(lambda: [search(few[i : i + 1]) for i in range(len(few))], clock)
    return ids, len(queries) / max(1e-9, min(seconds, again)), len(few) / max(1e-9, one)


def _timed(act: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[float, Any]:
    start = clock()
    result = act()
    return clock() - start, result
