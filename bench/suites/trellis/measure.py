"""Error of trellis codes by `tersor.compress`: Gaussian rows, peers, heads; other data and real matrices, rotated.

A real matrix's error is the mean of several rotations, and so is that of the Gaussian matrix of its shape beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

import tersor
from bench import baselines, models
from bench.suite import Asked, Outcome, Result
from bench.suites.trellis.cases import MOST, REAL, ROTATIONS, SHAPE, WITHIN, Case, HeadCase, PeerCase, RealCase
from bench.suites.two_basis.models import matrices_of
from tersor import testing
from tersor.testing import gaussian

SEED = 0
MAKERS = {"student_t3": testing.student_t3, "outliers": testing.outliers}


def measure(cases: Sequence[Case], asked: Asked) -> Iterator[Outcome]:
    """Yield the error of every case."""
    matrix = gaussian(SHAPE, SEED)
    for case in cases:
        if isinstance(case, RealCase):
            yield real(case, asked.models)
        elif isinstance(case, HeadCase):
            yield one(case, gaussian((SHAPE[0] * SHAPE[1] // case.width, case.width), SEED), case.target)
        elif isinstance(case, PeerCase):
            yield one(case, matrix, None, {"sweeps": case.sweeps} if case.sweeps else {})
        else:
            yield one(case, matrix, case.target, {"beam": case.beam} if case.beam else {})


def one(case: Case, matrix: Tensor, target: float | None, options: Mapping[str, Any] | None = None) -> Result:
    """Return the error of a codec on a matrix."""
    encoded = tersor.compress(matrix, codec=case.codec, **(options or {}))
    error = baselines.relative_error(matrix, encoded.decode())
    numbers = {"relative_mse": error, "rate": encoded.rate,
               "shannon_gap_db": baselines.shannon_gap(encoded.rate, error)}
    if target is not None:
        numbers["passed"] = error <= target
    return Result.of(case, encoded.nbytes, numbers, seed=SEED)


def real(case: RealCase, folder: Path) -> Result:
    """Return the error on a matrix, over that on a Gaussian one of its shape."""
    matrix = _matrix(case.matrix, folder)
    errors, nbytes = _rotated(matrix, case.codec)
    control = _control(matrix.shape[0], matrix.shape[1], case.codec)
    error = statistics.fmean(errors)
    numbers = {"relative_mse": error, "gaussian": control, "ratio": error / control, "shape": list(matrix.shape),
               "least": min(errors) / control, "most": max(errors) / control,
               "passed": error <= (1 + WITHIN) * control}
    return Result.of(case, nbytes, numbers, seed=SEED)


def _rotated(matrix: Tensor, codec: str) -> tuple[list[float], int]:
    """Return the error after each of several rotations, and the bytes, which are the same."""
    found = [tersor.compress(matrix, codec=f"rot@{seed},{codec}") for seed in range(ROTATIONS)]
    return [baselines.relative_error(matrix, encoded.decode()) for encoded in found], found[0].nbytes


@cache
def _control(rows: int, width: int, codec: str) -> float:
    return statistics.fmean(_rotated(gaussian((rows, width), SEED + 1), codec)[0])


@cache
def _matrix(name: str, folder: Path) -> Tensor:
    """Return the first rows of a matrix, of at most `MOST` elements."""
    model, key = REAL[name]
    if not model:
        return MAKERS[key]((MOST // SHAPE[1], SHAPE[1]), SEED)
    return _model(model, folder)[key]


@cache
def _model(model: str, folder: Path) -> Mapping[str, Tensor]:
    wanted = {key for name, key in REAL.values() if name == model}
    return {key: matrix[: MOST // matrix.shape[1]].contiguous().clone()
            for key, matrix in matrices_of(models.locate(model, folder)) if key in wanted}
