"""What a run would take: bytes, peak memory and time, estimated from one real matrix."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tersor.contract.codec import Codec
from tersor.files import exclusive
from tersor.hf.compress import survey
from tersor.hf.compress.desk import encode_matrix
from tersor.hf.compress.method import check_options, fixed_options, rungs
from tersor.hf.compress.plan import least_error, predict
from tersor.hf.compress.request import Request, budget_bytes, provenance
from tersor.hf.compress.run import CompressSettings
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, open_source, read_matrix
from tersor.planning.plan import check_weights

_INTERPRETER = 600 * 10**6  # Python with torch and transformers
_PASSES = {True: 3.0, False: 1.0}  # encode with feedback, and its measurement, in units of a plain trial


@exclusive("output")
def estimate(src: Path, output: Path, rate: float | None, size: int | None,
             settings: CompressSettings) -> dict[str, Any]:
    """Encode the matrix of median size once and scale up; reads nothing else and writes no output.

    Returns
    -------
    dict
        `bytes` (the budget), `bytes_original`, `peak_memory_bytes`, `seconds_survey`, `seconds_encode`,
        `seconds_calibrate_and_evaluate`, `seconds`, `matrices`, `least_bytes`.

    Raises
    ------
    BudgetError
        If the budget cannot be met.
    """
    work = WorkFolder(output)
    try:
        source = open_source(src, work / "staged", dense=settings.dense, leave_out=settings.leave_out)
        return _estimate(source, rate, size, settings)
    finally:
        work.clear("staged")


def _estimate(source: Source, rate: float | None, size: int | None, settings: CompressSettings) -> dict[str, Any]:
    request = Request(budget_bytes(source, rate, size), settings.method, settings.seed, settings.options,
                      settings.sensitivities, settings.effort)
    check_options(request)
    check_weights(list(source.layout.matrices), request.sensitivities)
    if request.budget >= source.nbytes:
        return {"bytes": source.nbytes, "bytes_original": source.original_nbytes, "copied": True, "seconds": 0.0}
    matrices = sorted(source.layout.matrices.values(), key=lambda m: m.shape[0] * m.shape[1])
    model_rate = 8 * request.budget / source.elements
    least = {m.name: rungs(request, m.shape, model_rate)[0] for m in matrices}
    record = provenance(source, None, request, "0")
    least_bytes = predict(source, least, record)
    if least_bytes > request.budget:
        raise least_error(source, request, least_bytes)
    sample = matrices[len(matrices) // 2]
    tried = rungs(request, sample.shape, model_rate)
    nearest = min(tried, key=lambda codec: abs(codec.rate(sample.shape) - model_rate))
    trial, encoding = _seconds(source, sample, nearest, request, settings.device)
    elements = sum(m.shape[0] * m.shape[1] for m in matrices)
    surveyed = sum(min(m.shape[0] * m.shape[1], 2 * survey.SURVEY_ELEMENTS) for m in matrices)
    surveying, encoding = trial * surveyed * len(tried), encoding * elements * _PASSES[settings.calibrated]
    forward = _forward_seconds(source.elements, settings)
    largest = 4 * matrices[-1].shape[0] * matrices[-1].shape[1]
    resident = 4 * source.elements if settings.calibrated or settings.evaluation_tokens else 0
    moments = 4 * sum({m.shape[1] ** 2 for m in matrices}) if settings.calibrated else 0
    return {"bytes": request.budget, "bytes_original": source.original_nbytes, "least_bytes": least_bytes,
            "matrices": len(matrices), "peak_memory_bytes": _INTERPRETER + max(resident + moments, 3 * largest),
            "seconds_survey": surveying, "seconds_encode": encoding, "seconds_calibrate_and_evaluate": forward,
            "seconds": surveying + encoding + forward}


def _seconds(source: Source, matrix: Matrix, codec: Codec, request: Request, device: str) -> tuple[float, float]:
    """Return the seconds an element that a trial of a codec takes, and that encoding takes; the second of two runs.

    The first run loads, or compiles, what the encoder calls.
    """
    dense = survey.sampled(read_matrix(source, matrix, device))
    options = fixed_options(codec, {**request.options, "feedback": False}, calibrated=False)
    took = (0.0, 0.0)
    for _ in range(2):
        began = time.perf_counter()
        list(survey.trials(source, matrix, dense, [codec], None, request, whole=False))
        between = time.perf_counter()
        encode_matrix(dense, codec, None, request.seed, options, matrix.name)
        took = between - began, time.perf_counter() - between
    return took[0] / dense.numel(), took[1] / dense.numel()


def _forward_seconds(elements: int, settings: CompressSettings) -> float:
    """Scale a timed matrix product to the forward and backward passes of calibration and evaluation."""
    side = torch.ones(1024, 1024, device=settings.device)
    began = time.perf_counter()
    for _ in range(4):
        torch.mm(side, side)
    flop_seconds = (time.perf_counter() - began) / (4 * 2 * 1024**3)
    sampling = settings.sampling
    tokens = (sampling.tokens + 3 * sampling.fisher_tokens) if settings.calibrated else 0
    return 2 * elements * (tokens + 2 * settings.evaluation_tokens) * flop_seconds * 2
