"""What a run would take: bytes, room, peak memory and time, from shapes and one real matrix."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import torch

from tersor.contract.codec import Codec
from tersor.families import stand_in
from tersor.files import exclusive
from tersor.hf.compress import survey
from tersor.hf.compress.cluster import check_engine
from tersor.hf.compress.desk import encode_matrix
from tersor.hf.compress.method import check_options, fixed_options, rungs
from tersor.hf.compress.needs import Shapes, disk, memory_by_stage, room_beside
from tersor.hf.compress.plan import least_error, predict
from tersor.hf.compress.reading import BATCH_TOKENS
from tersor.hf.compress.request import Request, budget_bytes, provenance
from tersor.hf.compress.run import CompressSettings
from tersor.hf.compress.work import WorkFolder, memory
from tersor.hf.models.flow import HELD
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, open_source, read_matrix
from tersor.hf.recover.training import halves
from tersor.numerics.linalg import inverse_cholesky, upper_factor
from tersor.numerics.settings import pinned, threads_allowed
from tersor.planning.plan import check_weights

ENCODED = 1 << 19  # elements of a matrix that are encoded to take the time
WIDTH = 1024  # of what is encoded, at most, and of the Hessian whose factoring is timed: it grows with the cube
CONTEXT = 22 * 10**8  # bytes of a process that works on CUDA, besides those of one that does not; measured
WAITING = 3  # copies of the largest matrix on its way between files and a GPU, about
PRODUCT = 2048  # vectors of the product that is timed
OVERHEAD = 1.2  # of a pass over its products: norms, and what moves in memory
RUNS = 2.8  # of text through a block that is encoded: before, of the dense model; up to the last matrix; and after
HALF = 0.6  # of moments, which are symmetric, what is added up
BACK = 4  # times the price of a pass: forward, and forward and back once more
UNREAD = {"source_sha256": hashlib.sha256().hexdigest()}  # stands for what is known once all weights are read
VERIFY = 10.0  # seconds in which a new process imports what it needs


@exclusive("output")
def estimate(src: Path, output: Path, rate: float | None, size: int | None,
             settings: CompressSettings) -> dict[str, Any]:
    """Encode a part of the matrix of median size and scale up; reads nothing else and writes no output.

    Returns
    -------
    dict
        `bytes` (the budget), `bytes_original`, `least_bytes`, `matrices`, `peak_memory_bytes` (of the host),
        `device_memory_bytes`, `disk_bytes`, `seconds_calibrate`, `seconds_survey`, `seconds_encode`, `seconds_verify`,
        `seconds_recover` where there is to be a recovery, `seconds_evaluate`, `seconds`. For a GPU that is not here,
        `seconds` is None, and no weights are read.

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
    request = Request(budget_bytes(source.elements, rate, size), settings.method, settings.seed, settings.options,
                      settings.sensitivities, settings.effort)
    check_options(request)
    if settings.engine is not None:
        check_engine(settings.engine)
    check_weights(list(source.layout.matrices), request.sensitivities)
    if request.budget >= source.nbytes:
        return {"bytes": source.nbytes, "bytes_original": source.original_nbytes, "copied": True, "seconds": 0.0}
    matrices = sorted(source.layout.matrices.values(), key=lambda m: m.shape[0] * m.shape[1])
    model_rate = 8 * request.budget / source.elements
    least = {m.name: rungs(request, m.shape, model_rate)[0] for m in matrices}
    training = settings.recovery
    record = provenance(source, None, request, "0", fingerprints=UNREAD) | (training.record(source) if training else {})
    least_bytes = predict(source, least, record)
    if least_bytes > request.budget:
        raise least_error(source, request, least_bytes)
    elsewhere = _elsewhere(settings)
    places = (settings.device,) if elsewhere else settings.places
    host = torch.device(places[0]).type == "cpu"
    shapes = Shapes.of(source, places[0], whole=settings.whole)
    seconds = {} if elsewhere else _seconds(source, shapes, request, settings)
    stages = memory_by_stage(shapes, settings.sampling, settings.evaluation_tokens, settings.context,
                             calibrated=settings.calibrated, workers=threads_allowed() if host else len(places),
                             copies=len(places))
    if training is not None:
        carried, alone = training.tokens * shapes.width * shapes.number, training.blocks and shapes.blocks
        stages["recover"] = (training.memory(shapes.block if alone else source.elements) + 2 * min(HELD, carried)
                             + (stages["encode"] + min(HELD, carried) if alone else 0))
    beside = CONTEXT + WAITING * shapes.largest * shapes.number
    return {"bytes": request.budget, "bytes_original": source.original_nbytes, "least_bytes": least_bytes,
            "matrices": len(matrices), "peak_memory_bytes": memory() + (max(stages.values()) if host else beside),
            "device_memory_bytes": None if host else max(stages.values()),
            "disk_bytes": disk(shapes, request.budget, settings.sampling, calibrated=settings.calibrated),
            **{f"seconds_{stage}": took for stage, took in seconds.items()},
            "seconds": None if elsewhere else sum(seconds.values()) - _beside(shapes, seconds, settings)}


def _elsewhere(settings: CompressSettings) -> bool:
    """Return whether the run is meant for a GPU that this machine does not have: memory follows from shapes alone."""
    named = re.fullmatch(r"cuda(:\d+)?", settings.device)
    return settings.devices is None and named is not None and not torch.cuda.is_available()


def _beside(shapes: Shapes, seconds: dict[str, float], settings: CompressSettings) -> float:
    """Return the seconds for which the verification runs beside the evaluation."""
    beside = room_beside(shapes, settings.places[0], settings.evaluation_tokens, settings.context)
    return min(seconds["verify"], seconds["evaluate"]) if beside else 0.0


def _seconds(source: Source, shapes: Shapes, request: Request, settings: CompressSettings) -> dict[str, float]:
    """Return the seconds of each stage, from one matrix that is tried, encoded and decoded, and a product timed."""
    matrices = sorted(source.layout.matrices.values(), key=lambda m: m.shape[0] * m.shape[1])
    sample = matrices[len(matrices) // 2]
    model_rate = 8 * request.budget / source.elements
    tried = rungs(request, sample.shape, model_rate)
    encoded = {stand_in(codec, sample.shape)[0] for codec in tried}  # of several, one is tried
    nearest = min(tried, key=lambda codec: abs(codec.rate(sample.shape) - model_rate))
    trial, encoding, decoding = _timed(source, sample, nearest, request, settings)
    factored = _factoring(settings) * sum(m.shape[1] ** 3 for m in matrices) if settings.calibrated else 0.0
    elements = sum(m.shape[0] * m.shape[1] for m in matrices)
    surveyed = sum(min(m.shape[0] * m.shape[1], 2 * survey.SURVEY_ELEMENTS) for m in matrices)
    reading = _forward_seconds(shapes, sample, settings)
    hands = 1 if torch.device(settings.places[0]).type == "cpu" else len(settings.places)
    return {"calibrate": reading["calibrate"] / hands,
            "survey": (trial * surveyed * len(encoded) + reading["survey"]) / hands,
            "encode": (encoding * elements + factored + reading["encode"]) / hands,
            "verify": VERIFY + 4 * decoding * elements,
            **({"recover": reading["recover"]} if settings.recovery is not None else {}),
            "evaluate": reading["evaluate"] + (2 * decoding * elements if settings.evaluation_tokens else 0)}


def _timed(source: Source, matrix: Matrix, codec: Codec, request: Request,
           settings: CompressSettings) -> tuple[float, float, float]:
    """Return the seconds an element that a trial of a codec takes, encoding, and decoding; the second of two runs.

    The first run loads, or compiles, what the encoder calls.
    """
    whole = read_matrix(source, matrix, settings.places[0])
    width = min(matrix.shape[1], WIDTH)
    dense = whole[: max(1, min(len(whole), ENCODED // width)), :width].to(torch.float32).contiguous()
    hessian = torch.eye(width, device=dense.device) if settings.calibrated else None
    options = fixed_options(codec, request.options, calibrated=settings.calibrated)
    took, tried = (0.0, 0.0, 0.0), survey.Tried.of(source, matrix, [codec], None, request)
    for _ in range(2):
        times = [time.perf_counter()]
        survey.trials(tried, tried.part(whole))
        times.append(time.perf_counter())
        encoded, _ = encode_matrix(dense, codec, hessian, request.seed, options, matrix.name)
        times.append(time.perf_counter())
        encoded.decode()
        times.append(time.perf_counter())
        took = times[1] - times[0], times[2] - times[1], times[3] - times[2]
    sampled = survey.sampled(whole).numel()
    return took[0] / sampled, took[1] / dense.numel(), took[2] / dense.numel()


def _factoring(settings: CompressSettings) -> float:
    """Return the seconds that factoring a Hessian takes, by the cube of its width; the second of two runs."""
    hessian, took = torch.eye(WIDTH, device=settings.places[0]), 0.0
    factor = upper_factor if hessian.is_cuda else inverse_cholesky
    with pinned():
        for _ in range(2):
            began = time.perf_counter()
            float(factor(hessian, 0.01)[0, 0])
            took = time.perf_counter() - began
    return took / WIDTH**3


def _forward_seconds(shapes: Shapes, sample: Matrix, settings: CompressSettings) -> dict[str, float]:
    """Scale a timed matrix product to the passes of text through the model, stage by stage."""
    flop = _flop(sample, settings)
    sampling, tokens = settings.sampling, settings.evaluation_tokens
    read, drawn = (sampling.tokens, sampling.fisher_tokens) if settings.calibrated else (0, 0)
    blocks, outside = max(1, shapes.blocks), 2 * shapes.outside
    # attention meets all of a window, whatever is masked: two products of so many numbers
    passed = blocks * (2 * shapes.block + 4 * sampling.context * shapes.width)
    moments = blocks * 2 * shapes.moments
    each = flop * OVERHEAD / max(1, min(threads_allowed(), read // BATCH_TOKENS))
    training = settings.recovery
    slower = 1.0 if halves(torch.device(settings.places[0])) else OVERHEAD  # the product is timed in 32 bits
    trained = 0.0 if training is None else (training.forwards() * (passed + outside) * flop * slower
                                            / threads_allowed())
    return {"recover": trained, "calibrate": drawn * (BACK * passed + (BACK - 1) * outside) * each,
            "survey": min(read, survey.SURVEY_TOKENS) * (passed + HALF * moments) * each,
            "encode": read * (RUNS * passed + (1 + HALF) * moments) * each,
            "evaluate": tokens * 2 * (passed + outside) * flop * OVERHEAD}


def _flop(sample: Matrix, settings: CompressSettings) -> float:
    """Return the seconds of a floating-point operation in a product by a matrix of a shape; the best of four."""
    x = torch.ones(PRODUCT, sample.shape[1], device=settings.places[0], dtype=torch.float32)
    w = torch.ones(sample.shape[1], sample.shape[0], device=settings.places[0], dtype=torch.float32)
    took = []
    with pinned():
        for _ in range(4):
            began = time.perf_counter()
            float(torch.mm(x, w)[0, 0])
            took.append(time.perf_counter() - began)
    return min(took) / (2 * PRODUCT * sample.shape[0] * sample.shape[1])
