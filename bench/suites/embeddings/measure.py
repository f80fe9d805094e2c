"""Sentence embeddings as whole matrices: what 3 nearest neighbours make of them after compression, at equal bits.

MiniLM embeddings of banking77 (77 intents): 10,003 training and 3,080 test sentences x 384, unit length. The training
matrix is compressed whole and without labels, decoded, and used as the neighbours; the test sentences stay raw (a set
in store, fresh queries), or are compressed by the same method as a matrix of their own. Every vote is by L2 among 3; of
three different labels the nearest one's counts. The published CIFAR protocol, which compressed class by class and drew
its queries from the training set, is not used.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tersor
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.embeddings.cases import EmbeddingCase
from bench.suites.vectors import sentences
from tersor.errors import TersorError
from tersor.vectors.nearest import Best

SEED, K = 0, 3


def labels() -> tuple[Tensor, Tensor]:
    """Return the intents of training and test sentences, int64."""
    names: dict[str, int] = {}
    parts = []
    for part in ("train", "test"):
        with (sentences.TASKS / "banking77" / f"{part}.csv").open(newline="") as handle:
            parts.append(torch.tensor([names.setdefault(row["category"], len(names))
                                       for row in csv.DictReader(handle)]))
    return parts[0], parts[1]


def classify(x: Tensor, intents: Tensor, queries: Tensor) -> Tensor:
    """Return the label of each query by the majority of its K nearest rows of `x`; of no majority, the nearest's."""
    found = Best(len(queries), K)
    for start in range(0, len(x), 8192):
        part = x[start : start + 8192]
        found.offer(queries @ part.T - part.square().sum(1) / 2, torch.arange(start, start + len(part)))
    votes = intents[found.ids]
    count = (votes.unsqueeze(2) == votes.unsqueeze(1)).sum(2)  # of each vote, how many agree with it
    return votes.gather(1, count.argmax(1, keepdim=True)).squeeze(1)  # the first of the most: the nearest


def scores(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return accuracy, and the F1 of the classes weighted by how often each is true (0 if never right)."""
    total = 0.0
    for label in truth.unique():
        right = float(((found == label) & (truth == label)).sum())
        total += 2 * right * float((truth == label).sum()) / float((found == label).sum() + (truth == label).sum())
    return float((found == truth).float().mean()), total / len(truth)


def frobenius(x: Tensor, decoded: Tensor) -> float:
    """Return ‖X - X̂‖ / ‖X‖."""
    return math.sqrt(float((x - decoded).double().square().sum()) / float(x.double().square().sum()))


def compress(x: Tensor, case: EmbeddingCase) -> tuple[Tensor, dict[str, Any]]:
    """Return the decoded matrix, and what it took."""
    if case.method == "original":
        return x, {"codec": "float32", "bytes": x.nbytes, "rate": 32.0, "frobenius": 0.0, "encode_s": 0.0}
    start = time.process_time()
    encoded = tersor.compress(x, float(case.bits) if case.method in tersor.families() else None, case.method, SEED)
    seconds = time.process_time() - start
    decoded = encoded.decode()
    return decoded, {"codec": str(encoded.codec), "bytes": encoded.nbytes, "rate": encoded.rate,
                     "frobenius": frobenius(x, decoded), "encode_s": seconds}


def measure(cases: Sequence[EmbeddingCase], asked: Asked) -> Iterator[Outcome]:
    """Yield every case."""
    del asked
    (train, test), (intents, truth) = sentences.embeddings(), labels()
    for case in cases:
        try:
            decoded, numbers = compress(train, case)
            queries, of_test = compress(test, case)
        except TersorError as problem:
            yield Unmeasured(case.key, str(problem))
            continue
        for name, given in (("raw", test), ("decoded", queries)):
            numbers[f"accuracy_{name}"], numbers[f"f1_{name}"] = scores(classify(decoded, intents, given), truth)
        numbers |= {"test_bytes": of_test["bytes"], "test_frobenius": of_test["frobenius"], "rows": len(train),
                    "queries": len(test), "dim": train.shape[1]}
        yield Result.of(case, numbers["bytes"], numbers, seed=SEED)
