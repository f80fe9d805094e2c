"""Seconds to encode an 8B-shaped model of random weights on a GPU, matrix by matrix.

Each distinct shape a few times, which sums to an estimate; `encode|model` is every matrix of the model, drawn, encoded,
measured and written to a store, one after another, which is the time that counts. With error feedback the time has in
it what a Hessian of the matrix's own costs, turned and factored; in a model several matrices share one, for which see
`encode_blocks`.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.suites.gpu import model, payload
from bench.suites.gpu.cases import Encode, EncodeModel
from bench.suites.gpu.timing import SEED, device, settle
from bench.worker import Emit, SkipError, listed
from tersor import store
from tersor.payload.blocks import Shape
from tersor.quality import measure
from tersor.registry import parse

REPEATS, ENOUGH = 3, 3.0  # encodings of a shape, at most; seconds after which no further one begins
WARMED = 512  # columns whose encoding compiles what is launched
TOLD = 16  # matrices between two lines of progress
# relative squared error that Gaussian matrices must not exceed: two bases at 1,000 sweeps; trellis codes 1 % above what
# docs/codecs/trellis.md has, without feedback, or under the Hessian that feedback is there for
WORST = {"two2x2": 0.0795, "rot,tr3o": 0.0195, "rot,tr3x16o": 0.0183}
LEAST_WIDTH = 1024  # of matrices that are judged: rehearsals are of short lines


def setup() -> None:
    """Prepare nothing."""


def run(case: Encode | EncodeModel, emit: Emit) -> None:
    """Run a case."""
    if isinstance(case, Encode):
        _matrix(case, emit)
    else:
        _model(case, emit)


def _options(case: Encode | EncodeModel) -> dict[str, Any]:
    return {"sweeps": case.sweeps} if "two" in case.codec else {}


def drawn(shape: Shape, seed: int) -> Tensor:
    """Return a Gaussian matrix, bf16 as in a model."""
    return payload.weight(shape, payload.generator(seed))


def hessian_of_width(width: int) -> Tensor:
    """Return the Hessian of twice as many Gaussian inputs as they have numbers: eigenvalues of .09 to 2.9."""
    inputs = torch.randn(2 * width, width, device=device(), generator=payload.generator(SEED))
    return inputs.T @ inputs / len(inputs)


def _warm(case: Encode) -> None:
    """Encode so that all that is launched is compiled: as many rows, since launches depend on them, and few columns."""
    rows, width = case.shape
    if _options(case):
        parse(case.codec).encode(drawn((min(256, rows), width), 99), options={"sweeps": 2})
        return
    width = min(WARMED, width)
    hessian = hessian_of_width(width) if case.feedback else None
    parse(case.codec).encode(drawn((rows, width), 99), hessian=hessian, options={"feedback": case.feedback})


def _matrix(case: Encode, emit: Emit) -> None:
    shape, codec = case.shape, parse(case.codec)
    weights, nbytes, times, errors = shape[0] * shape[1], 0, list[float](), list[float]()
    _warm(case)
    hessian = hessian_of_width(shape[1]) if case.feedback else None
    options = _options(case) or {"feedback": case.feedback}
    while not times or (len(times) < (1 if weights > 1 << 28 else REPEATS) and sum(times) < ENOUGH):
        matrix = drawn(shape, len(times))
        settle()
        began = time.perf_counter()
        encoded = codec.encode(matrix, hessian=hessian, options=options)
        settle()
        times.append(time.perf_counter() - began)
        errors.append(measure(matrix, encoded, hessian).distortion)
        print(f"    {case.key}: {times[-1]:.2f} s, error {errors[-1]:.4f}", flush=True)
        nbytes = encoded.nbytes
        del matrix, encoded
    seconds = statistics.median(times)
    judged = case.sweeps >= 1000 if _options(case) else shape[1] >= LEAST_WIDTH
    limit = WORST.get(case.codec) if judged else None
    emit(case.key, listed(case), nbytes, {
        "seconds": seconds, "seconds_most": max(times), "repeats": len(times), "relative_error": max(errors),
        "ns": 1e9 * seconds / weights, **({"ns_sweep": 1e9 * seconds / weights / case.sweeps} if case.sweeps else {}),
        "of_model_s": seconds * case.count, "red": limit is not None and max(errors) > limit})


def _model(case: EncodeModel, emit: Emit) -> None:
    """Draw, encode, check and write every matrix; lines of progress are results too, in case the time runs out."""
    made, codec = model.config(case.layers), parse(case.codec)
    entries = model.entries(made, codec)
    folder = model.STORES / "encoded"
    shutil.rmtree(folder, ignore_errors=True)
    state = {"encode_s": 0.0, "weights": 0, "matrices": 0, "worst": 0.0}
    total = sum(e.shape[0] * e.shape[1] for e in entries if e.codec is not None)
    began = time.perf_counter()

    def numbers() -> dict[str, Any]:
        seconds, share = time.perf_counter() - began, state["weights"] / total
        return {**state, "seconds": seconds, "share": share, "whole_s": seconds / share,
                "ns_sweep": 1e9 * state["encode_s"] / state["weights"] / case.sweeps}

    def coded(entry: store.Entry) -> Mapping[str, Tensor]:
        if entry.codec is None:
            return {"": torch.ones(entry.shape, dtype=torch.bfloat16)}
        matrix = drawn((entry.shape[0], entry.shape[1]), SEED + int(state["matrices"]))
        settle()
        start = time.perf_counter()
        encoded = entry.codec.encode(matrix, options=_options(case))
        held = {name: tensor.cpu() for name, tensor in encoded.tensors.items()}
        state["encode_s"] += time.perf_counter() - start
        state["worst"] = max(state["worst"], measure(matrix, encoded).relative_error)
        state["weights"] += matrix.numel()
        state["matrices"] += 1
        over = time.perf_counter() - began > case.most
        if over or state["matrices"] % TOLD == 0:
            emit(f"encode|partial|{case.codec}|{case.sweeps}", listed(case), 0, {**numbers(), "red": over})
        if over:
            raise SkipError(f"{case.most:.0f} s are over, with {100 * state['weights'] / total:.0f} % encoded")
        return held

    store.write(folder, entries, coded, kind="model", files=model.companions(made))
    done = numbers()
    limit = WORST.get(case.codec) if case.sweeps >= 1000 else None
    nbytes = store.stored_nbytes(folder)
    if device().type == "cuda":
        done["peak"] = torch.cuda.max_memory_allocated()
    emit(case.key, listed(case), nbytes, {**done, "red": limit is not None and done["worst"] > limit})
    shutil.rmtree(folder)
