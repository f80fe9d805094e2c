"""turbovec, and usearch with numbers of one byte: what they find, and what they store.

turbovec ranks by inner products, so that it is asked where all vectors have one length. usearch searches a graph, whose
edges are stored, too; `exact` reads all its numbers instead. Bytes are those of their files.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.suites.vectors.cases import VectorCase

FEW, SAMPLE, K = 20, 1024, 10  # queries one by one; vectors that turbovec is calibrated on, as it says; neighbours
UNEQUAL = 1e-3  # of the mean length: from there on lengths differ
ENGINES = ("turbovec", "usearch")


def run_other(case: VectorCase, x: Tensor, queries: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return ids found and numbers of a case; `cannot` among them where it does not fit.

    Raises
    ------
    ValueError
        If lengths differ where inner products are all there is.
    ModuleNotFoundError
        If the package is not installed.
    """
    engine, _, name = case.method.partition(":")
    wide, asked = x.numpy(), queries.numpy()
    lengths = x.norm(dim=1)
    if engine == "turbovec" and float(lengths.std() / lengths.mean()) > UNEQUAL:
        raise ValueError("turbovec ranks by inner products, and lengths differ here")
    start = time.process_time()
    search, nbytes = (_turbovec if engine == "turbovec" else _usearch)(name, wide)
    built = time.process_time() - start
    start = time.process_time()
    ids = search(asked)
    batch = time.process_time() - start
    start = time.process_time()
    for place in range(FEW):
        search(asked[place : place + 1])
    one = time.process_time() - start
    return torch.from_numpy(ids.astype(np.int64)), {
        "codec": name, "stored_bytes": nbytes / len(x), "table_bytes": 0, "queries_per_s": len(queries) / batch,
        "single_queries_per_s": FEW / one, "train_s": 0.0, "encode_s": built}


Search = Callable[[np.ndarray], np.ndarray]


def _turbovec(name: str, x: np.ndarray) -> tuple[Search, int]:
    index = importlib.import_module("turbovec").TurboQuantIndex(x.shape[1], int(name))
    index.calibrate(x[np.random.default_rng(0).permutation(len(x))[:SAMPLE]])
    index.add(x)
    index.prepare()
    return lambda asked: index.search(asked, K)[1], len(index.to_bytes())


def _usearch(name: str, x: np.ndarray) -> tuple[Search, int]:
    kind, _, how = name.partition(" ")
    peak = float(np.abs(x).max())  # bytes stand for numbers from -1 to 1
    index: Any = importlib.import_module("usearch.index").Index(ndim=x.shape[1], metric="l2sq", dtype=kind)
    index.add(np.arange(len(x)), x / peak, threads=1)
    return lambda asked: index.search(asked / peak, K, threads=1, exact=how == "exact").keys, index.serialized_length
