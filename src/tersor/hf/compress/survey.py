"""Stage 2: what each rung of a ladder costs and saves on each matrix of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.contract.codec import Codec
from tersor.families import stand_in
from tersor.files import exclusive
from tersor.hf.compress import sensitivity
from tersor.hf.compress.method import check_options, fixed_options, rungs
from tersor.hf.compress.request import Progress, Request, no_progress
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, read_matrix
from tersor.numerics.settings import pinned
from tersor.planning.calibration import Calibration, hessian_of
from tersor.planning.plan import Choice, check_weights
from tersor.planning.trials import Trials
from tersor.quality import measure

SURVEY_ELEMENTS = 1 << 16  # elements of a matrix that a trial encodes


@exclusive("output")
def run(source: Source, calibration: Calibration | None, request: Request, output: Path, *, device: str = "cpu",
        progress: Progress = no_progress) -> dict[str, list[Choice]]:
    """Encode every matrix with every rung near the budget; one JSON line a trial in `output`, resumed if there.

    The cost of a choice is its relative distortion times the matrix's weight: what the request says, else the Fisher
    estimate of the KL, else the matrix's share of the elements. Surveys run without error feedback, which lowers all
    rungs of a matrix by about the same factor, and large matrices are tried on evenly spaced rows only; but where one
    of the rungs is spectral (low rank), neither shortcut is fair: all of them take every row, and feedback if wanted.
    """
    given = check_weights(list(source.layout.matrices), request.sensitivities)
    check_options(request)
    known = open_trials(source, calibration, request, output)
    rate, matrices = 8 * request.budget / source.elements, source.layout.matrices
    choices: dict[str, list[Choice]] = {}
    for number, (name, matrix) in enumerate(matrices.items()):
        progress("survey", number, len(matrices))
        tried = rungs(request, matrix.shape, rate)
        missing = [codec for codec in tried if known.find(name, codec.spec()) is None]
        whole = any(codec.traits().spectral for codec in tried)
        for record in trials(source, matrix, missing, calibration, request, device, whole=whole) if missing else ():
            known.add(record)
        found = [(codec, known.find(name, codec.spec()) or {}) for codec in tried]
        choices[name] = [Choice(codec, line["nbytes"], line["distortion"] * given.get(name, line["weight"]))
                         for codec, line in found]
    progress("survey", len(matrices), len(matrices))
    return choices


def open_trials(source: Source, calibration: Calibration | None, request: Request, path: Path) -> Trials:
    """Open a survey's file; its mark is a digest of what its figures depend on."""
    seen = None if calibration is None else [calibration.sha256, calibration.source, calibration.tokens,
                                               sorted(calibration.fisher.items())]
    facts = [source.fingerprint, seen, request.seed, sorted(request.options.items())]
    mark = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return Trials(path, "survey", mark, key=("matrix", "codec"), numbers=("nbytes", "distortion", "weight"),
                  hint="this model with this calibration, seed and options; name another file, or give the "
                       "--calibration, --seed and --option that 'tersor survey' was given")


def sampled(dense: Tensor) -> Tensor:
    """Return evenly spaced rows of a matrix, in float32: what a trial encodes."""
    return dense[:: max(1, dense.numel() // SURVEY_ELEMENTS)].to(torch.float32)


def trials(source: Source, matrix: Matrix, codecs: Sequence[Codec], calibration: Calibration | None, request: Request,
           device: str, *, whole: bool) -> Iterator[dict[str, Any]]:
    """Encode a matrix with each codec; yield the survey's lines.

    A sample of its rows without error feedback, and with a codec that stands in where encoding is long, or the `whole`
    matrix with feedback.
    """
    dense = read_matrix(source, matrix, device)
    dense = dense.to(torch.float32) if whole else sampled(dense)
    hessian = hessian_of(calibration, matrix.name, device)
    trace = None if calibration is None else calibration.fisher.get(matrix.name)
    elements = matrix.shape[0] * matrix.shape[1]
    with pinned():  # the plan follows from these figures, so they must not depend on the threads
        weight = elements / source.elements if trace is None else sensitivity.weight(trace, dense, hessian)
    for codec in codecs:
        tried, factor = (codec, 1.0) if whole else stand_in(codec, (dense.shape[0], dense.shape[1]))
        options = fixed_options(tried, request.options if whole else {**request.options, "feedback": False},
                                calibrated=whole and hessian is not None)
        tables = tried.train([dense], seed=request.seed)
        with pinned():
            encoded = tried.encode(dense, hessian=hessian if whole else None, seed=request.seed, options=options,
                                   tables=tables)
            quality = measure(dense, encoded, hessian)
        yield {"matrix": matrix.name, "codec": codec.spec(), "nbytes": codec.nbytes(matrix.shape),
               "distortion": factor * quality.distortion, "relative_error": factor * quality.relative_error,
               "weight": weight}
