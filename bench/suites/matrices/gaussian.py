"""Error of synthetic matrices against rate, ours and peers' side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.matrices.cases import MatrixCase
from tersor import testing

SEED = 0


def one(case: MatrixCase, matrix: Tensor) -> Result:
    """Measure one case."""
    start = time.perf_counter()
    decoded = baselines.quantize(case.method, matrix, SEED)
    seconds = time.perf_counter() - start
    error = baselines.relative_error(matrix, decoded.matrix)
    rate = 8 * decoded.nbytes / matrix.numel()
    gap = baselines.shannon_gap(rate, error)
    numbers: dict[str, Any] = {"relative_mse": error, "rate": rate, "shannon_gap_db": gap, "seconds": seconds}
    if case.target is not None:
        numbers["passed"] = (error <= case.target * (1 + case.tolerance)
                             and abs(rate - case.bits) <= case.rate_tolerance)
    return Result.of(case, decoded.nbytes, numbers, seed=SEED)


def measure(cases: Sequence[MatrixCase], asked: Asked) -> Iterator[Outcome]:
    """Yield the error of every case; a matrix is drawn once for all its methods."""
    del asked
    held, matrix = ("", 0), torch.empty(0)
    for case in cases:
        if not baselines.available(case.method):
            yield Unmeasured(case.key, "its package is not installed")
            continue
        if held != (case.data, case.size):
            matrix = getattr(testing, case.data)((case.size, case.size), SEED)
            held = case.data, case.size
        yield one(case, matrix)
