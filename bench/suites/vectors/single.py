"""One query at a time, on one thread: methods in turn within one process, so that a busy machine slows all alike.

Times are processor time of a call, ten queries of each method in every round. The median is over all calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.vectors import Index

ROUNDS, EACH, BATCHES, BATCH, K = 40, 10, 3, 200, 10
TRAINED = 65_536  # vectors that product codes of FAISS are trained on

Search = Callable[[np.ndarray], np.ndarray]


def run_single(methods: tuple[str, ...], x: Tensor, queries: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return recall, and milliseconds of one query and of one in a batch, by method."""
    asked = queries.numpy()
    made = {name: _made(name, x) for name in methods}
    found: dict[str, dict[str, Any]] = {}
    for name, (search, codec, nbytes) in made.items():
        ids = torch.from_numpy(search(asked))
        right = float((ids.unsqueeze(2) == truth.unsqueeze(1)).any(1).float().mean())
        found[name] = {"codec": codec, "code_bytes": nbytes, "recall": right}
    alone: dict[str, list[float]] = {name: [] for name in methods}
    together: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(ROUNDS):
        for name, (search, _, _) in made.items():
            for place in range(turn * EACH, (turn + 1) * EACH):
                one = asked[place % len(asked)][None]
                alone[name].append(_seconds(lambda search=search, one=one: search(one)))
            if turn < BATCHES:
                together[name].append(_seconds(lambda search=search: search(asked[:BATCH])) / BATCH)
    for name in methods:
        found[name] |= {"single_ms": 1e3 * float(np.median(alone[name])),
                        "single_least_ms": 1e3 * float(np.quantile(alone[name], 0.1)),
                        "batch_ms": 1e3 * float(np.median(together[name]))}
    return found


def _made(name: str, x: Tensor) -> tuple[Search, str, int]:
    engine, _, method = name.partition(":")
    if engine == "tersor":
        index = Index(x.shape[1], method)
        index.train(x)
        index.add(x)
        return lambda asked: index.search(asked, K)[1], str(index.codec), index.code_size
    import faiss

    other = faiss.index_factory(x.shape[1], method)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # files may be sorted, as words are
    other.train(x[order[:TRAINED]].numpy())
    other.add(x.numpy())
    return lambda asked: other.search(asked, K)[1], method, other.sa_code_size()


def _seconds(act: Callable[[], object]) -> float:
    start = time.process_time_ns()
    act()
    return (time.process_time_ns() - start) / 1e9
