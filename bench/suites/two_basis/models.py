"""Two-basis codes on real matrices and on language models, beside rotation + Lloyd-Max, Kashin and symmetric codebooks.

Matrices: relative error of `two2x2` on every matrix, by kind (the name without the layer), over that of a Gaussian
matrix of the same shape; a kind passes if its worst matrix is within 2 %. Models: one codec for every matrix, embedding
and head included, all with error feedback where the codec has it; perplexity, KL and top-1 on the three held-out texts,
every stored byte counted. Calibration reads the packaged text.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tersor
from bench import evaluation, models
from bench.suite import Asked, Result
from bench.suites.two_basis.cases import LanguageCase, Matrices, MatrixCase
from tersor import store
from tersor.hf.compress import calibrate
from tersor.hf.compress import encode as stage
from tersor.hf.compress.method import fixed_options
from tersor.hf.compress.request import Request, Sampling, provenance
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.text import default_calibration
from tersor.planning.calibration import Calibration
from tersor.quality import measure as quality
from tersor.registry import parse
from tersor.testing import gaussian

SEED = 0
TOKENS = 40_000  # of each held-out text
WITHIN = 0.02  # of the Gaussian matrix's error
LEAST_ROWS = 8


def matrices_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a safetensors file, a transformers folder or a GGUF file, float32."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if len(file.get_slice(name).get_shape()) == 2:
                    yield name, file.get_tensor(name).to(torch.float32)
        return
    for name, parameter in evaluation.matrices(evaluation.load_model(path)).items():
        yield name, parameter.detach()


def kinds(asked: Matrices, path: Path) -> Iterator[Result]:
    """Yield a result a kind of matrix."""
    name, device, sweeps = asked.model, asked.device, asked.sweeps
    found: dict[tuple[str, int, int], list[float]] = {}
    expected: dict[tuple[int, int], float] = {}
    codec, options = parse("two2x2"), {"sweeps": sweeps}

    def error(matrix: Tensor) -> float:
        return quality(matrix, codec.encode(matrix, seed=SEED, options=options)).relative_error

    for full, matrix in matrices_of(path):
        rows, width = matrix.shape
        if rows < LEAST_ROWS:
            continue
        if (rows, width) not in expected:
            expected[rows, width] = error(gaussian((rows, width), SEED).to(device))
        kind = re.sub(r"\.\d+\.", ".*.", full).removeprefix("model.").removesuffix(".weight")
        found.setdefault((kind, rows, width), []).append(error(matrix.to(device)))
    for (kind, rows, width), errors in found.items():
        control = expected[rows, width]
        numbers = {"relative_error": statistics.fmean(errors), "gaussian": control, "matrices": len(errors),
                   "ratio": statistics.fmean(errors) / control, "worst": max(errors) / control,
                   "passed": max(errors) <= (1 + WITHIN) * control}
        yield Result.of(MatrixCase(name, kind, rows, width, sweeps, device), 0, numbers, seed=SEED)


def encode(source: Source, calibration: Calibration, case: LanguageCase, folder: Path) -> tuple[Path, float]:
    """Run the pipeline's encoding with one codec for every matrix; return the store's folder and seconds."""
    codec = parse(case.method)
    wanted = {"sweeps": case.sweeps, "block": case.block} if case.sweeps else {}
    request = Request(source.nbytes, case.method, SEED, fixed_options(codec, wanted, calibrated=True))
    job = stage.Job(source, dict.fromkeys(source.layout.matrices, codec), calibration, request,
                    provenance(source, calibration, request, tersor.__version__))
    began = time.perf_counter()
    work = WorkFolder(folder)
    stage.run(job, work, device=case.device)
    return work / "output", time.perf_counter() - began


@torch.no_grad()
def decoded_model(source: Source, path: Path, output: Path, device: str) -> nn.Module:
    """Return the dense model, float32, with every matrix replaced by what the store decodes to."""
    model, opened = evaluation.load_model(path), store.read(output)
    for matrix in source.layout.matrices.values():
        encoded = opened.matrix(matrix.name)
        held = {key: tensor.to(device) for key, tensor in encoded.tensors.items()}
        matrix.take(model.get_parameter(matrix.parameter)).copy_(dataclasses.replace(encoded, tensors=held).decode())
    return model.to(device)


def one_model(cases: Sequence[LanguageCase], path: Path, device: str) -> Iterator[Result]:
    """Yield the cases of one model."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source = open_source(path, root / "staged")
        calibration = calibrate.run(source, default_calibration(), root / "calibration.safetensors",
                                    Sampling(fisher_tokens=0), device=device)
        texts = {key: text.to(device) for key, text in evaluation.windows(source.folder, TOKENS).items()}
        original = evaluation.load_model(source.folder).to(device)
        for number, case in enumerate(cases):
            output, seconds = encode(source, calibration, case, root / str(number))
            nbytes = store.stored_nbytes(output)
            candidate = decoded_model(source, source.folder, output, device)
            result = evaluation.compare(original, {"it": candidate}, texts)["it"]
            numbers: dict[str, Any] = {"rate": 8 * nbytes / source.elements, "parameters": source.elements,
                                       "seconds": seconds, "context": evaluation.CONTEXT, **result}
            yield Result.of(case, nbytes, numbers, seed=SEED)


def measure(cases: Sequence[Matrices | LanguageCase], asked: Asked) -> Iterator[Result]:
    """Yield real matrices, then models."""
    for case in cases:
        if isinstance(case, Matrices):
            yield from kinds(case, models.locate(case.model, asked.models))
    language = [case for case in cases if isinstance(case, LanguageCase)]
    for name in dict.fromkeys(case.model for case in language):
        own = [case for case in language if case.model == name]
        yield from one_model(own, models.locate(name, asked.models), asked.device)
