"""A million vectors x 128 from a mapped file, in inverted lists: each method in a process of its own, for its memory.

Built on two threads, searched on one. Vectors lie around 20,000 points, with variances that fall as 1 / i.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.places import kept
from bench.suite import Asked, Outcome
from bench.suites.matrices.memory import peak_bytes
from bench.suites.vectors.cases import MillionCase
from bench.worker import Emit, Run
from tersor.vectors import Index, fill, open_vectors
from tersor.vectors.nearest import Best

COUNT, DIM, POINTS, QUERIES, K, SEED = 1_000_000, 128, 20_000, 1000, 10, 0
CHUNK = 50_000
PROBES = (1, 4, 16, 64)
THREADS = 2  # of building
PATIENCE = 3600.0  # seconds that a busy machine may take for one case
LIMITS = {"clock_s": 600.0, "peak_bytes": 1.5e9}  # of building, and of all


def _files() -> tuple[Path, Path, Path]:
    folder = kept("vectors")
    return folder / "million.npy", folder / "million-queries.npy", folder / "million-truth.npy"


def made() -> None:
    """Write vectors, queries and their true neighbours, unless they are there."""
    base, asked, truth = _files()
    if truth.is_file():
        return
    random = np.random.default_rng(SEED)
    spread = 1 / np.sqrt(np.arange(1, DIM + 1, dtype=np.float32))
    points = random.standard_normal((POINTS, DIM), np.float32) * spread
    queries = _drawn(random, points, spread, QUERIES)
    best, wide = Best(QUERIES, K), torch.from_numpy(queries)
    held = np.lib.format.open_memmap(base, "w+", np.float32, (COUNT, DIM))
    for start in range(0, COUNT, CHUNK):
        part = _drawn(random, points, spread, CHUNK)
        held[start : start + CHUNK] = part
        x = torch.from_numpy(part)
        best.offer(wide @ x.T - x.square().sum(1) / 2, torch.arange(start, start + CHUNK))
    held.flush()
    np.save(asked, queries)
    np.save(truth, best.ids.numpy())


def _drawn(random: np.random.Generator, points: np.ndarray, spread: np.ndarray, count: int) -> np.ndarray:
    chosen = points[random.integers(0, len(points), count)]
    return chosen + random.standard_normal((count, points.shape[1]), np.float32) * spread * np.float32(0.7)


def measure(cases: Sequence[MillionCase], asked: Asked) -> Iterator[Outcome]:
    """Yield every case, each from a process of its own."""
    made()
    for case in cases:
        yield from Run(__name__, asked, limit=2 * PATIENCE, patience=PATIENCE).outcomes([case])


def setup() -> None:
    """See `bench.worker`: nothing is shared by cases."""


def run(case: MillionCase, emit: Emit) -> None:
    """Build, then search with several numbers of lists."""
    base, asked, truth = (str(file) for file in _files())
    queries, true = np.load(asked), np.load(truth)
    engine, _, name = case.method.partition(":")
    torch.set_num_threads(THREADS)
    start, processor = time.perf_counter(), time.process_time()
    search, nbytes, numbers = (_tersor if engine == "tersor" else _faiss)(name, base)
    numbers |= {"clock_s": time.perf_counter() - start, "processor_s": time.process_time() - processor}
    numbers["built_bytes"] = peak_bytes()
    torch.set_num_threads(1)
    search(queries[:1], 1)  # codes are laid out
    for probes in PROBES:
        start = time.process_time()
        ids = search(queries, probes)
        numbers[f"queries_per_s_{probes}"] = QUERIES / (time.process_time() - start)
        numbers[f"recall_{probes}"] = float((ids[:, :, None] == true[:, None, :]).any(1).mean())
    numbers |= {"peak_bytes": peak_bytes(), "vectors": COUNT, "dim": DIM}
    if engine == "tersor":
        numbers["passed"] = all(numbers[key] <= most for key, most in LIMITS.items())
    emit(case.key, dataclasses.asdict(case), nbytes, numbers)


Search = Callable[[np.ndarray, int], np.ndarray]


def _tersor(name: str, base: str) -> tuple[Search, int, dict[str, Any]]:
    """Return what searches, the bytes stored, and numbers: of an index that was saved and loaded again."""
    index = fill(Index(DIM, name, seed=SEED, effort="normal" if "auto" in name else "fast"), open_vectors(base))
    with tempfile.TemporaryDirectory(dir=kept("vectors")) as folder:
        index.save(f"{folder}/index")
        index = Index.load(f"{folder}/index")
    return lambda queries, probes: index.search(queries, K, nprobe=probes)[1], index.nbytes, {"codec": str(index.codec)}


def _faiss(name: str, base: str) -> tuple[Search, int, dict[str, Any]]:
    """Return what searches, the bytes stored, and numbers; of its own ids the codes have 8 bytes, left out."""
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(THREADS)
    source, index = open_vectors(base), faiss.index_factory(DIM, name)
    index.train(source.sample(1 << 17, SEED))
    for part in source.chunks():
        index.add(part)
    faiss.omp_set_num_threads(1)
    inner = faiss.extract_index_ivf(index)

    def search(queries: np.ndarray, probes: int) -> np.ndarray:
        inner.nprobe = probes
        return index.search(queries, K)[1]

    return search, inner.code_size * COUNT, {"codec": name}
