"""QET, product quantization and scalar codecs at equal total bytes: eight matrices at 2, 3, 4 and 6 bits an element.

Every method gets the best setting found within `floor(bits x elements / 8)` bytes, all stored bytes counted. Settings
of the product quantizers are screened on 64 columns, in eight runs of eight: a codebook serves its own columns only, so
bits and errors per element hardly depend on the width. The best two are then measured on the whole matrix.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tersor
from bench import baselines
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.qet.cases import GridCase
from bench.suites.qet.data import MATRICES
from tersor.codecs import Scalar, Standardized
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.families import Ladder
from tersor.families.builtin import SCALAR_LEVELS
from tersor.families.qet import Preset
from tersor.payload.blocks import Shape

SEED = 0
DIMS = (1, 2, 4, 8)
LAYERS = (1, 2, 3)
SCREEN_RUNS, SCREEN_WIDTH = 8, 8
FINALISTS = 2


def structures(method: str) -> Iterator[Preset]:
    """Yield the structures of a product quantizer that are tried; their codebooks follow from the budget."""
    if method == "pq":
        for dim, book in itertools.product(DIMS, ("fp32", "fp16", "b10")):
            yield Preset("pq", (0,), (1.0,), book, dim=dim)
    elif method == "pq_residual":  # published QET without its swaps
        for dim, split in itertools.product(DIMS, ((0.7, 0.3), (0.5, 0.5))):
            yield Preset("pq_residual", (0, 0), split, "b10", dim=dim)
    elif method == "qet_vanilla":
        for dim, book, layers in itertools.product(DIMS, ("fp32", "b10"), LAYERS):
            yield Preset("qet_vanilla", (layers,), (1.0,), book, dim=dim)
    else:
        for dim, layers in itertools.product(DIMS, LAYERS):
            yield Preset("qet", (layers, 0), (0.7, 0.3), "b10", dim=dim)


def standardized_scalars(shape: Shape, nbytes: int) -> Iterator[Codec]:
    """Yield Lloyd-Max quantizers of standardized columns: Gaussian or fitted table, a scale a row or a column."""
    bare = Scalar(2)
    left = nbytes - (Standardized(bare).nbytes(shape) - bare.nbytes(shape))
    for codebook, axis in itertools.product(("gaussian", "fitted"), ("in", "out")):
        rungs = tuple(Scalar(levels, codebook, None, axis) for levels in SCALAR_LEVELS)
        yield Standardized(Ladder(rungs).fit(shape, left))


def candidates(method: str, shape: Shape, nbytes: int) -> list[Codec]:
    """Return the distinct codecs of a method that fit; those of fewer than two codewords a stage do not."""
    if method == "standardized_lm":
        return list(standardized_scalars(shape, nbytes))
    found = []
    for structure in structures(method):
        try:
            found.append(structure.fit(shape, nbytes))
        except BudgetError:
            continue
    return list(dict.fromkeys(found))


def screened(matrix: Tensor, codecs: list[Codec]) -> list[Codec]:
    """Return the codecs that do best on a few columns."""
    runs = torch.linspace(0, matrix.shape[1] // SCREEN_WIDTH - 1, SCREEN_RUNS).round().to(torch.int64)
    part = torch.cat([matrix[:, run * SCREEN_WIDTH : (run + 1) * SCREEN_WIDTH] for run in runs.tolist()], 1)
    errors = {codec: baselines.relative_error(part, _round_trip(part, codec).matrix) for codec in codecs}
    return sorted(codecs, key=errors.__getitem__)[:FINALISTS]


def _round_trip(matrix: Tensor, codec: Codec) -> baselines.Decoded:
    encoded = tersor.compress(matrix, codec=codec, seed=SEED)
    return baselines.Decoded(encoded.decode(), encoded.nbytes, codec.spec())


def quantize(matrix: Tensor, case: GridCase, nbytes: int) -> baselines.Decoded:
    """Return the best of a method on a matrix.

    Raises
    ------
    CannotRunError
        If nothing fits.
    """
    if ":" in case.method:
        try:
            return baselines.quantize(f"{case.method}@{case.bits}", matrix, SEED)
        except BudgetError as error:
            raise baselines.CannotRunError(str(error)) from error
    codecs = candidates(case.method, (matrix.shape[0], matrix.shape[1]), nbytes)
    if not codecs:
        raise baselines.CannotRunError(f"{case.method}: no setting stores {tuple(matrix.shape)} in {nbytes} bytes")
    finalists = codecs if case.method == "standardized_lm" else screened(matrix, codecs)
    return min((_round_trip(matrix, codec) for codec in finalists),
               key=lambda decoded: baselines.relative_error(matrix, decoded.matrix))


def one(case: GridCase, matrix: Tensor) -> Result:
    """Measure one method in one cell.

    Raises
    ------
    AssertionError
        If a method used more than the budget.
    """
    budget = case.bits * matrix.numel() // 8
    start = time.perf_counter()
    try:
        decoded = quantize(matrix, case, budget)
    except baselines.CannotRunError as error:
        return Result.of(case, 0, {"nmse": None, "reason": str(error), "budget": budget}, seed=SEED)
    if decoded.nbytes > budget:
        raise AssertionError(f"{case.key}: {decoded.nbytes} bytes, {budget} allowed")
    relative = baselines.relative_error(matrix, decoded.matrix)
    wide = matrix.to(torch.float64)
    nmse = relative * float(wide.square().mean() / wide.var(correction=0))
    numbers: dict[str, Any] = {
        "nmse": nmse, "relative_mse": relative, "rate": 8 * decoded.nbytes / matrix.numel(), "budget": budget,
        "setting": decoded.detail, "seconds": time.perf_counter() - start}
    return Result.of(case, decoded.nbytes, numbers, seed=SEED)


def measure(cases: Sequence[GridCase], asked: Asked) -> Iterator[Outcome]:
    """Yield the best of every method in every cell."""
    del asked
    for data in dict.fromkeys(case.data for case in cases):
        matrix = MATRICES[data]()
        for case in (case for case in cases if case.data == data):
            yield one(case, matrix) if baselines.available(case.method) else Unmeasured(
                case.key, "its package is not installed")
