"""Does QET reproduce? The released code's figures at 4x from fp32, by its own accounting, and the theory's constants.

Everything is measured twice: by the transcription in `published.py` and by Tersor's presets.

* `nmse`, `ratio`, `order`: 8 bits an element, sub-vectors of 4 columns; MSE over variance. `order`: PQ above QET
  without its residual stage, that above QET. OPQ has no target; its rotation does not fit beside a square matrix.
* `mask_bits`: bits an element for l layers of swaps; exactly l / 2.
* `block_variance`: mean variance of the 2^l column blocks after the swaps, for unit normal numbers.
* `penalty`: by how much the MSE of a fine quantizer, the same for all columns, rises at equal total bits when each
  swapped block is coded on its own. With step d, error d^2 / 12 and h bits of differential entropy, an ideal entropy
  coder spends h - log2 d bits; so at equal bits the error rises by 4^(l / 2 + mean_b h_b - h). `entropy`: by Vasicek's
  estimate of h. `entropy-coded`: no formula; a uniform quantizer with the empirical entropy of its codes, whose step is
  widened until masks and codes together need as many bits as without swaps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import tersor
from bench.suite import Asked, Result, Section
from bench.suites.qet import cases, published
from bench.suites.qet.data import MATRICES
from tersor import testing
from tersor.codecs import Dense, Scalar, Swap
from tersor.errors import BudgetError
from tersor.families.qet import PRESETS, published_nbytes

SEED = 0
DIM = 4
ORDER = ("pq", "qet_vanilla", "qet")
SAMPLES = (1 << 16, 64)
FINE_STEP = 1 / 32
PENALTY_TOLERANCE = 0.03
VARIANCE_TOLERANCE = 0.01
Case = cases.ReproductionCase
Array = np.ndarray
Figure = tuple[Case, float, dict[str, Any], int]


def matrices() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of the released code's table, cut as there: 192 columns or 2048 rows at most."""
    for name in cases.QET_REPRODUCED:
        matrix = MATRICES[name]()
        wide = 192 if name == "minilm_wff" else matrix.shape[1]
        yield name, matrix[:2048, :wide].contiguous()


def by_transcription(matrix: torch.Tensor, method: str, nbytes: int) -> tuple[float, int, str]:
    """Return normalized MSE, charged bytes and setting; ValueError if the method cannot run."""
    x = matrix.numpy()
    result = published.METHODS[method](x, DIM, 8 * nbytes)
    return published.normalized_error(x, result.decoded), -(-result.bits // 8), f"{result.sizes} codewords"


def by_tersor(matrix: torch.Tensor, method: str, nbytes: int) -> tuple[float, int, str]:
    """Return the same from Tersor's preset; BudgetError if the method cannot run."""
    shape = (matrix.shape[0], matrix.shape[1])
    codec = PRESETS[method].with_dim(DIM).from_memory(shape, nbytes)
    decoded = tersor.compress(matrix, codec=codec, seed=SEED).decode()
    return (published.normalized_error(matrix.numpy(), decoded.numpy()), published_nbytes(codec, shape),
            codec.spec())


IMPLEMENTATIONS: Mapping[str, Callable[[torch.Tensor, str, int], tuple[float, int, str]]] = {
    "transcription": by_transcription, "tersor": by_tersor}


def released_code() -> Iterator[Figure]:
    """Yield the figures of the released code."""
    for data, matrix in matrices():
        for name, measure in IMPLEMENTATIONS.items():
            errors: dict[str, float] = {}
            for method in (*ORDER, "opq"):
                try:
                    error, nbytes, setting = measure(matrix, method, matrix.numel())
                except (ValueError, BudgetError) as failure:
                    print(f"{data}, {method} by {name}: cannot run: {failure}")
                    continue
                if nbytes > matrix.numel():
                    raise AssertionError(f"{data}, {method}: {nbytes} bytes charged, {matrix.numel()} allowed")
                errors[method] = error
                target = cases.QET_PUBLISHED.get(data, {}).get(method)
                yield (Case("nmse", data, method, name, target, cases.QET_TOLERANCE if target else 0.0), error,
                       {"setting": setting}, nbytes)
            fallen = all(errors[a] > errors[b] for a, b in itertools.pairwise(ORDER))
            yield (Case("order", data, " > ".join(ORDER), name, 1.0), float(fallen),
                   {"shown": " > ".join(f"{errors[method]:.4f}" for method in ORDER)}, 0)
            gaussian = data == "gaussian1024"
            yield (Case("ratio", data, "qet / pq", name, cases.QET_RATIO if gaussian else None,
                        cases.QET_TOLERANCE if gaussian else 0.0), errors["qet"] / errors["pq"], {}, 0)


def swapped_by_transcription(matrix: torch.Tensor, layers: int) -> tuple[Array, float]:
    """Return the swapped matrix and the mask bits an element."""
    swapped, masks = published.tree(matrix.numpy(), layers)
    return swapped, sum(mask.size for mask in masks) / matrix.numel()


def swapped_by_tersor(matrix: torch.Tensor, layers: int) -> tuple[Array, float]:
    """Return the same from Tersor's codec: what it hands to its inner codec, and what its payload has beyond that."""
    inner = Dense("fp32")
    encoded = tersor.compress(matrix, codec=Swap(inner, layers))
    shape = (matrix.shape[0], matrix.shape[1])
    mask_bits = 8 * (encoded.nbytes - inner.nbytes(shape)) / matrix.numel()
    coarse = tersor.compress(matrix, codec=Swap(Scalar(4), layers)).nbytes - Scalar(4).nbytes(shape)
    if coarse * 8 / matrix.numel() != mask_bits:
        raise AssertionError(f"masks of {layers} layers: {mask_bits} bits, {coarse * 8 / matrix.numel()} with codes")
    return encoded.child("inner", inner, shape).decode().numpy(), mask_bits


def swaps() -> Iterator[Figure]:
    """Yield mask bits and block variances; both implementations must swap alike."""
    matrix = testing.gaussian(SAMPLES, SEED)
    for name, swap in (("transcription", swapped_by_transcription), ("tersor", swapped_by_tersor)):
        for layers, target in cases.QET_BLOCK_VARIANCE.items():
            swapped, mask_bits = swap(matrix, layers)
            if not np.array_equal(swapped, published.tree(matrix.numpy(), layers)[0]):
                raise AssertionError(f"{name}: {layers} layers of swaps differ from the transcription's")
            variance = float(np.mean([block.var() for block in blocks(swapped, layers)]))
            yield Case("mask_bits", "gaussian", f"{layers} layers", name, layers / 2), mask_bits, {}, 0
            yield (Case("block_variance", "gaussian", f"{layers} layers", name, target, VARIANCE_TOLERANCE), variance,
                   {}, 0)


def blocks(swapped: Array, layers: int) -> list[Array]:
    """Return the numbers of each column block, float64, in one dimension."""
    return [block.astype(np.float64).reshape(-1) for block in np.split(swapped, 1 << layers, axis=1)]


def vasicek(values: Array) -> float:
    """Return the differential entropy of a sample in bits: mean log of spacings of order √n."""
    ordered, window = np.sort(values), round(len(values) ** 0.5)
    upper = np.concatenate([ordered[window:], np.full(window, ordered[-1])])
    lower = np.concatenate([np.full(window, ordered[0]), ordered[:-window]])
    return float(np.log2((upper - lower) * len(values) / (2 * window)).mean())


def entropy_coded(parts: list[Array], step: float) -> tuple[float, float]:
    """Return bits an element and MSE of a uniform quantizer whose codes are entropy-coded part by part."""
    rates, errors = [], []
    for values in parts:
        codes = np.round(values / step).astype(np.int64)
        share = np.unique(codes, return_counts=True)[1] / len(values)
        rates.append(float(-(share * np.log2(share)).sum()))
        errors.append(float(np.square(values - step * codes).mean()))
    return float(np.mean(rates)), float(np.mean(errors))


def widened(parts: list[Array], rate: float, step: float) -> float:
    """Return the MSE at the step, above `step`, at which entropy-coded codes cost `rate` bits an element."""
    low, high = step, 16 * step
    for _ in range(14):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy_coded(parts, middle)[0] > rate else (low, middle)
    return entropy_coded(parts, (low * high) ** 0.5)[1]


def laws() -> Iterator[tuple[str, Array]]:
    """Yield samples of four continuous laws of unit scale, float32."""
    rng = np.random.default_rng(SEED)
    yield "gaussian", rng.standard_normal(SAMPLES, np.float32)
    yield "laplace", rng.laplace(size=SAMPLES).astype(np.float32)
    yield "student_t3", rng.standard_t(3, size=SAMPLES).astype(np.float32)
    yield "uniform", rng.uniform(-2, 2, SAMPLES).astype(np.float32)


def penalties() -> Iterator[Figure]:
    """Yield the rise of the error at equal total bits, for one to three layers of swaps."""
    for law, sample in laws():
        plain = blocks(sample, 0)
        entropy, (rate, error) = vasicek(plain[0]), entropy_coded(plain, FINE_STEP)
        for layers, target in cases.QET_PENALTY.items():
            parts = blocks(published.tree(sample, layers)[0], layers)
            spread = float(np.mean([vasicek(part) for part in parts])) - entropy + layers / 2
            yield (Case("penalty", law, f"{layers} layers", "entropy", target, PENALTY_TOLERANCE), 4.0**spread, {}, 0)
            if law == "gaussian":
                coded = widened(parts, rate - layers / 2, FINE_STEP) / error
                yield (Case("penalty", law, f"{layers} layers", "entropy-coded", target, PENALTY_TOLERANCE), coded,
                       {"rate": rate}, 0)


SECTIONS: Mapping[str, Callable[[], Iterator[Figure]]] = {
    "released": released_code, "swaps": swaps, "penalties": penalties}


def measure(chosen: Sequence[Section], asked: Asked) -> Iterator[Result]:
    """Yield every figure of the sections."""
    del asked
    for section in chosen:
        for case, value, extra, nbytes in SECTIONS[section.name]():
            passed = None if case.target is None else abs(value / case.target - 1) <= case.tolerance
            yield Result.of(case, nbytes, {"value": value, "passed": passed, **extra}, seed=SEED)
