"""Survey: what each rung of a ladder costs and saves on each matrix of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor import plan as planning
from tersor.calibration import Calibration
from tersor.codec import Codec, check_matrix
from tersor.families import AUTO, FAMILIES, Ladder, families
from tersor.hf import sensitivity
from tersor.hf.request import Progress, Request, no_progress
from tersor.hf.source import Source
from tersor.hf.walk import Matrix
from tersor.linalg import single_thread
from tersor.plan import Choice
from tersor.quality import measure
from tersor.registry import parse

SURVEY_SPAN = (0.45, 2.2)  # rungs surveyed, as multiples of the rate asked for
SURVEY_ELEMENTS = 1 << 18  # elements of a matrix that a trial encodes


def ladders(method: str) -> Sequence[Ladder]:
    """Return the ladders that a method names: a family's, or one rung for a concrete codec string."""
    if method in families():
        return [ladder for name, group in FAMILIES.items() if method in (AUTO, name) for ladder in group]
    return [Ladder((parse(method),))]


def fixed_options(codec: Codec, options: Mapping[str, Any], *, calibrated: bool) -> dict[str, Any]:
    """Return the options that `codec` reads; error feedback is on by default where there is a Hessian."""
    known = codec.option_names()
    wanted = {"feedback": calibrated, **options}
    return {key: value for key, value in sorted(wanted.items()) if key in known}


def survey(source: Source, calibration: Calibration | None, request: Request, output: Path, *, device: str = "cpu",
           progress: Progress = no_progress) -> dict[str, list[Choice]]:
    """Encode every matrix with every rung near the budget; one JSON line a trial in `output`, resumed if there.

    The cost of a choice is its relative distortion times the matrix's weight: what the request says, else the Fisher
    estimate of the KL, else the matrix's share of the elements. Surveys run without error feedback, which lowers all
    rungs of a matrix by about the same factor, and large matrices are tried on evenly spaced rows only.
    """
    done = _read_survey(output)
    rate = 8 * request.budget / source.elements
    matrices = source.layout.matrices
    choices: dict[str, list[Choice]] = {name: [] for name in matrices}
    given = planning.check_weights(list(matrices), request.sensitivities)
    with output.open("a") as handle:
        for number, (name, matrix) in enumerate(matrices.items()):
            progress("survey", number, len(matrices))
            tried = rungs(request.method, matrix.shape, rate)
            missing = [codec for codec in tried if (name, codec.spec()) not in done]
            for record in trials(source, matrix, missing, calibration, request, device) if missing else ():
                done[name, record["codec"]] = record
                handle.write(json.dumps(record) + "\n")
                handle.flush()
            for codec in tried:
                record = done[name, codec.spec()]
                cost = record["distortion"] * given.get(name, record["weight"])
                choices[name].append(Choice(codec, record["nbytes"], cost))
    progress("survey", len(matrices), len(matrices))
    return choices


def _read_survey(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    done: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            done[record["matrix"], record["codec"]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the last line of a killed run may be cut short; that trial is run again
    return done


def trials(source: Source, matrix: Matrix, codecs: Sequence[Codec], calibration: Calibration | None, request: Request,
           device: str) -> Iterator[dict[str, Any]]:
    """Encode a sample of one matrix's rows with each codec, without feedback; yield the survey's lines."""
    dense = read_matrix(source, matrix, device)
    dense = dense[:: max(1, dense.numel() // SURVEY_ELEMENTS)].to(torch.float32)
    hessian = hessian_of(calibration, matrix, device)
    trace = None if calibration is None else calibration.fisher.get(matrix.name)
    elements = matrix.shape[0] * matrix.shape[1]
    with single_thread():  # the plan follows from these figures, so they must not depend on the threads
        weight = elements / source.elements if trace is None else sensitivity.weight(trace, dense, hessian)
    for codec in codecs:
        options = fixed_options(codec, {**request.options, "feedback": False}, calibrated=False)
        tables = codec.train([dense], seed=request.seed)
        with single_thread():
            encoded = codec.encode(dense, seed=request.seed, options=options, tables=tables)
            quality = measure(dense, encoded, hessian)
        yield {"matrix": matrix.name, "codec": codec.spec(), "nbytes": codec.nbytes(matrix.shape),
               "distortion": quality.distortion, "relative_error": quality.relative_error, "weight": weight}


def rungs(method: str, shape: tuple[int, int], rate: float) -> list[Codec]:
    """Return the rungs worth trying on a matrix when the whole model has `rate` bits per element; always the least."""
    listed = [ladder.at(rung) for ladder in ladders(method) for rung in ladder.rungs]
    listed = sorted(dict.fromkeys(listed), key=lambda codec: codec.nbytes(shape))
    low, high = SURVEY_SPAN
    near = [rung for rung in listed if low * rate <= rung.rate(shape) <= high * rate]
    return near if near and near[0] == listed[0] else [listed[0], *near]


def read_matrix(source: Source, matrix: Matrix, device: str) -> Tensor:
    """Read one matrix of a source to `device`, checked for NaN and infinity by name."""
    tensor = source.matrix(matrix).to(device)
    check_matrix(tensor, matrix.name)
    return tensor


def hessian_of(calibration: Calibration | None, matrix: Matrix, device: str) -> Tensor | None:
    """Return a matrix's Hessian on `device`, if it was calibrated."""
    hessian = None if calibration is None else calibration.hessians.get(matrix.name)
    return None if hessian is None else hessian.to(device)
