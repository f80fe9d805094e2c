"""Survey: what each rung of a ladder costs and saves on each matrix of a model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError
from tersor.hf.compress import sensitivity
from tersor.hf.compress.method import check_options, fixed_options, rungs
from tersor.hf.compress.request import Progress, Request, no_progress
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, hessian_of, read_matrix
from tersor.numerics.linalg import single_thread
from tersor.planning import plan as planning
from tersor.planning.calibration import Calibration
from tersor.planning.plan import Choice
from tersor.quality import measure

SURVEY_ELEMENTS = 1 << 16  # elements of a matrix that a trial encodes


def survey(source: Source, calibration: Calibration | None, request: Request, output: Path, *, device: str = "cpu",
           progress: Progress = no_progress) -> dict[str, list[Choice]]:
    """Encode every matrix with every rung near the budget; one JSON line a trial in `output`, resumed if there.

    The cost of a choice is its relative distortion times the matrix's weight: what the request says, else the Fisher
    estimate of the KL, else the matrix's share of the elements. Surveys run without error feedback, which lowers all
    rungs of a matrix by about the same factor, and large matrices are tried on evenly spaced rows only; but where one
    of the rungs is spectral (low rank), neither shortcut is fair: all of them take every row, and feedback if wanted.
    """
    given = planning.check_weights(list(source.layout.matrices), request.sensitivities)
    check_options(request)
    mark = survey_mark(source, calibration, request)
    done = _read_survey(output, mark)
    rate = 8 * request.budget / source.elements
    matrices = source.layout.matrices
    choices: dict[str, list[Choice]] = {name: [] for name in matrices}
    with output.open("a") as handle:
        if not output.stat().st_size:
            handle.write(json.dumps({"survey": mark}) + "\n")
        for number, (name, matrix) in enumerate(matrices.items()):
            progress("survey", number, len(matrices))
            tried = rungs(request.method, matrix.shape, rate)
            missing = [codec for codec in tried if (name, codec.spec()) not in done]
            whole = any(codec.traits().spectral for codec in tried)
            found = trials(source, matrix, missing, calibration, request, device, whole=whole) if missing else ()
            for record in found:
                done[name, record["codec"]] = record
                handle.write(json.dumps(record) + "\n")
                handle.flush()
            for codec in tried:
                record = done[name, codec.spec()]
                cost = record["distortion"] * given.get(name, record["weight"])
                choices[name].append(Choice(codec, record["nbytes"], cost))
    progress("survey", len(matrices), len(matrices))
    return choices


def survey_mark(source: Source, calibration: Calibration | None, request: Request) -> str:
    """Return what a survey's figures depend on, as a digest: its first line, so that files are never mixed up."""
    seen = None if calibration is None else [calibration.source, calibration.tokens, sorted(calibration.fisher.items())]
    facts = [source.fingerprint(), seen, request.seed, sorted(request.options.items())]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _read_survey(path: Path, mark: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Read a survey's lines; a last line that a killed run cut short is dropped, and its trial is run again."""
    if not path.exists() or not path.stat().st_size:
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    records = [_line(path, line) for line in whole.decode("utf-8", "replace").splitlines()]
    if not records or records[0] != {"survey": mark}:
        raise CodecConfigError(f"{path}: not a survey of this model with this calibration, seed and options; name "
                               "another file, or give the --calib, --seed and --option that 'tersor survey' was given")
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    done: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records[1:]:
        numbers = [record.get(key) for key in ("nbytes", "distortion", "weight")]
        if not all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in numbers):
            raise CodecConfigError(f"{path}: a line lacks a number: {str(record)[:100]}; run the survey again")
        done[str(record.get("matrix")), str(record.get("codec"))] = record
    return done


def _line(path: Path, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CodecConfigError(f"{path}: not a survey: '{line[:60]}' is no JSON") from error
    if not isinstance(record, dict):
        raise CodecConfigError(f"{path}: not a survey: '{line[:60]}' is no JSON object")
    return record


def trials(source: Source, matrix: Matrix, codecs: Sequence[Codec], calibration: Calibration | None, request: Request,
           device: str, *, whole: bool) -> Iterator[dict[str, Any]]:
    """Encode a matrix with each codec; yield the survey's lines.

    A sample of its rows without error feedback, or the `whole` matrix with it.
    """
    dense = read_matrix(source, matrix, device)
    dense = dense[:: 1 if whole else max(1, dense.numel() // SURVEY_ELEMENTS)].to(torch.float32)
    hessian = hessian_of(calibration, matrix, device)
    trace = None if calibration is None else calibration.fisher.get(matrix.name)
    elements = matrix.shape[0] * matrix.shape[1]
    with single_thread():  # the plan follows from these figures, so they must not depend on the threads
        weight = elements / source.elements if trace is None else sensitivity.weight(trace, dense, hessian)
    for codec in codecs:
        options = fixed_options(codec, request.options if whole else {**request.options, "feedback": False},
                                calibrated=whole and hessian is not None)
        tables = codec.train([dense], seed=request.seed)
        with single_thread():
            encoded = codec.encode(dense, hessian=hessian if whole else None, seed=request.seed, options=options,
                                   tables=tables)
            quality = measure(dense, encoded, hessian)
        yield {"matrix": matrix.name, "codec": codec.spec(), "nbytes": codec.nbytes(matrix.shape),
               "distortion": quality.distortion, "relative_error": quality.relative_error, "weight": weight}
