"""Error of trellis codes by `tersor.compress`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import tersor
from bench import baselines
from bench.suite import Asked, Outcome, Result
from bench.suites.trellis.cases import SHAPE, TrellisCase
from tersor.testing import gaussian

SEED = 0


def measure(cases: Sequence[TrellisCase], asked: Asked) -> Iterator[Outcome]:
    """Yield the error of every case, on the same matrix."""
    del asked
    matrix = gaussian(SHAPE, SEED)
    for case in cases:
        encoded = tersor.compress(matrix, codec=case.codec)
        error = baselines.relative_error(matrix, encoded.decode())
        numbers = {"relative_mse": error, "rate": encoded.rate,
                   "shannon_gap_db": baselines.shannon_gap(encoded.rate, error)}
        if case.target is not None:
            numbers["passed"] = error <= case.target
        yield Result.of(case, encoded.nbytes, numbers, seed=SEED)
