"""Time of products on the processor: a codec's and dense ones in turn, the least time of each.

Turns keep codes out of the nearer caches, as in a model, and let all suffer alike from what else the machine does. Time
is this thread's own: what it waits for others on a busy machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import tersor
from bench.suite import Asked, Outcome, Result
from bench.suites.cpu.cases import SHAPE, ProductCase
from tersor.contract.codec import Encoded
from tersor.testing import gaussian

SEED = 0
TURNS = {1: 40, 4: 20, 16: 10, 64: 4}


def random_payload(codec: str) -> Encoded:
    """Return a matrix of random codes: time does not depend on what is encoded."""
    generator, held = torch.Generator().manual_seed(SEED), {}
    parsed = tersor.parse(codec)
    for name, spec in parsed.layout(SHAPE).items():
        if spec.dtype.is_floating_point:
            held[name] = (torch.rand(spec.stored_shape, generator=generator) + 0.5).sort(-1).values.to(spec.dtype)
        else:
            held[name] = torch.randint(0, 256, spec.stored_shape, generator=generator, dtype=torch.uint8)
    return Encoded(parsed, SHAPE, held)


def least(calls: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Return the least milliseconds of each of some calls, made in turn."""
    found = {name: float("inf") for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if turn:
                found[name] = min(found[name], 1e3 * (time.thread_time() - start))
    return found


def measure(cases: Sequence[ProductCase], asked: Asked) -> Iterator[Outcome]:
    """Yield the times of every case."""
    del asked
    dense = gaussian(SHAPE, SEED)
    halves = dense.to(torch.bfloat16)
    for case in cases:
        encoded, x = random_payload(case.codec), gaussian((case.vectors, SHAPE[1]), SEED + 1)
        times = least(_calls(encoded, x, dense, halves), TURNS[case.vectors])
        ratios = {kind: times[f"dense_{kind}"] / times[kind] for kind in ("float32", "bfloat16")}
        numbers: dict[str, Any] = {**{f"{name}_ms": value for name, value in times.items()},
                                   **{f"{kind}_ratio": value for kind, value in ratios.items()}}
        if case.asked is not None:
            numbers["passed"] = min(ratios.values()) >= case.asked
        yield Result.of(case, encoded.nbytes, numbers, seed=SEED)


def _calls(encoded: Encoded, x: Tensor, dense: Tensor, halves: Tensor) -> dict[str, Callable[[], Any]]:
    half = x.to(torch.bfloat16)
    calls = {"dense_float32": lambda: linear(x, dense), "float32": lambda: encoded.matmul(x),
             "dense_bfloat16": lambda: linear(half, halves), "bfloat16": lambda: encoded.matmul(half)}
    if len(x) == 1:  # torch has a faster way for a vector that is no row of a matrix
        calls["mv_bfloat16"] = lambda: halves @ half[0]
    return calls
