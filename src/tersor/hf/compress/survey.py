"""Stage 2: what each rung of a ladder costs and saves on each matrix of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.contract.codec import Codec
from tersor.errors import CorruptStoreError
from tersor.families import stand_in
from tersor.files import exclusive, load_sealed, save_sealed, tell_damaged
from tersor.hf.compress import sensitivity
from tersor.hf.compress.checkpoint import Checkpoint, part_of
from tersor.hf.compress.method import check_options, fixed_options, rungs
from tersor.hf.compress.reading import Place, Reading, dense_of, steps
from tersor.hf.compress.request import Progress, Request, no_progress
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, read_matrix
from tersor.numerics.settings import pinned
from tersor.planning.calibration import Calibration, hessian_of, shared
from tersor.planning.plan import Choice, check_weights
from tersor.planning.trials import Trials
from tersor.quality import measure

SURVEY_ELEMENTS = 1 << 16  # elements of a matrix that a trial encodes


@exclusive("output")
def run(source: Source, calibration: Calibration | None, request: Request, output: Path, *, device: str = "cpu",
        reading: Reading | None = None, progress: Progress = no_progress) -> dict[str, list[Choice]]:
    """Encode every matrix with every rung near the budget; one JSON line a trial in `output`, resumed if there.

    The cost of a choice is its relative distortion times the matrix's weight: what the request says, else the Fisher
    estimate of the KL, else the matrix's share of the elements. Surveys run without error feedback, which lowers all
    rungs of a matrix by about the same factor, and large matrices are tried on evenly spaced rows only; but where one
    of the rungs is spectral (low rank), neither shortcut is fair: all of them take every row, and feedback if wanted.

    Parameters
    ----------
    calibration : Calibration or None
        What is known of the text; its moments, unless `reading` brings them.
    reading : Reading or None
        Text that is run through the dense model: a block's matrices are tried while its moments are there. Those of
        what lies outside of the blocks are kept beside `output`; see `outside`.
    """
    given = check_weights(list(source.layout.matrices), request.sensitivities)
    check_options(request)
    known = open_trials(source, calibration, request, output)
    rate, matrices = 8 * request.budget / source.elements, source.layout.matrices
    tried = {name: rungs(request, matrix.shape, rate) for name, matrix in matrices.items()}

    def missing(name: str) -> list[Codec]:
        return [codec for codec in tried[name] if known.find(name, codec.spec()) is None]

    def work(matrix: Matrix, dense: Tensor, seen: Calibration | None) -> None:
        whole = any(codec.traits().spectral for codec in tried[matrix.name])
        for record in trials(source, matrix, dense, missing(matrix.name), seen, request, whole=whole):
            known.add(record)

    if reading is None or calibration is None:
        _one_by_one(source, calibration, device, [m for m in matrices.values() if missing(m.name)], work, progress)
    else:
        by_blocks(reading, calibration, output, lambda m: bool(missing(m.name)), work, progress)
    choices: dict[str, list[Choice]] = {}
    for name in matrices:
        found = [(codec, known.find(name, codec.spec()) or {}) for codec in tried[name]]
        choices[name] = [Choice(codec, line["nbytes"], line["distortion"] * given.get(name, line["weight"]))
                         for codec, line in found]
    return choices


Work = Callable[[Matrix, Tensor, "Calibration | None"], None]


def _one_by_one(source: Source, calibration: Calibration | None, device: str, matrices: Sequence[Matrix], work: Work,
                progress: Progress) -> None:
    for number, matrix in enumerate(matrices):
        progress("survey", number, len(matrices))
        work(matrix, read_matrix(source, matrix, device), calibration)
    progress("survey", len(matrices), len(matrices))


def by_blocks(reading: Reading, calibration: Calibration, output: Path, missing: Callable[[Matrix], bool], work: Work,
               progress: Progress) -> None:
    """Run text through the dense model; work on the matrices of a block that miss trials while it is resident."""
    file = beside(output)
    if not any(map(missing, reading.source.layout.matrices.values())) and outside(file, reading.mark) is not None:
        return
    streamed = reading.streamed()
    last = len(streamed.blocks)
    first = next((stage for stage in range(last) if any(map(missing, streamed.matrices(stage)))), last)
    flow = reading.flow(streamed, "survey")
    place = Place(Checkpoint(part_of(output), reading.mark), flow)
    step = steps(last + 1, reading.tokens, lambda done, total: progress("survey", done, total))
    for stage in range(place.resume(first), last + 1):
        reading.position[:] = stage, last
        with streamed.resident(stage):
            wanted = stage == last or any(map(missing, streamed.matrices(stage)))
            moments = flow.through(stage, watch=wanted, keep=True, step=lambda done, stage=stage: step(stage, done))
            for matrix in streamed.matrices(stage):
                if missing(matrix):
                    work(matrix, dense_of(streamed, matrix), dataclasses.replace(calibration, hessians=moments))
            if stage == last:
                _keep(moments, file, reading.mark)
        place.passed(stage)
    place.drop()
    shutil.rmtree(reading.folder / "survey", ignore_errors=True)
    step(last + 1, 0)


def outside_of(reading: Reading, file: Path) -> dict[str, Tensor]:
    """Return the moments of matrices outside of all blocks; run the text through the dense model if they are not kept.

    They are needed before the blocks only by embeddings that are tied to what comes after the blocks.
    """
    found = outside(file, reading.mark)
    if found is not None:
        return found
    streamed = reading.streamed()
    flow, last = reading.flow(streamed, "outside"), len(streamed.blocks)
    if not any(m.name in streamed.reads and streamed.looks_up(m) for m in streamed.matrices(last)):
        return {}
    for stage in range(last):
        with streamed.resident(stage):
            flow.through(stage, watch=False, keep=True)
    moments = flow.through(last, watch=True, keep=False)
    _keep(moments, file, reading.mark)
    shutil.rmtree(reading.folder / "outside", ignore_errors=True)
    return moments


def _keep(moments: Mapping[str, Tensor], file: Path, mark: str) -> None:
    names, tensors = shared(moments)
    save_sealed(tensors, file, {"job": mark, "names": names})


def beside(output: Path) -> Path:
    """Return the file of the moments of matrices outside of all blocks, beside a survey."""
    return output.with_name(f"{output.name}.outside")


def outside(file: Path, mark: str) -> dict[str, Tensor] | None:
    """Return the moments of matrices outside of all blocks, such as the head; None if they are not there as written."""
    if not file.exists():
        return None
    try:
        tensors, record = load_sealed(file)
    except CorruptStoreError as error:
        tell_damaged(error)
        return None
    return {name: tensors[key] for name, key in record["names"].items()} if record["job"] == mark else None


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


def trials(source: Source, matrix: Matrix, given: Tensor, codecs: Sequence[Codec], calibration: Calibration | None,
           request: Request, *, whole: bool) -> Iterator[dict[str, Any]]:
    """Encode a matrix, `given` (out, in), with each codec; yield the survey's lines.

    A sample of its rows without error feedback, and with a codec that stands in where encoding is long, or the `whole`
    matrix with feedback.
    """
    dense = given.to(torch.float32) if whole else sampled(given)
    hessian = hessian_of(calibration, matrix.name, str(given.device))
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
