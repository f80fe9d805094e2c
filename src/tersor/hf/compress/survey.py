"""Stage 2: what each rung of a ladder costs and saves on each matrix of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tersor.contract.codec import Codec
from tersor.errors import CorruptStoreError
from tersor.families import stand_in
from tersor.files import exclusive, load_sealed, save_sealed, tell_damaged
from tersor.hf.compress import sensitivity
from tersor.hf.compress.checkpoint import Checkpoint, part_of
from tersor.hf.compress.crew import Crew, Hands, Task
from tersor.hf.compress.method import check_options, fixed_options, rungs
from tersor.hf.compress.reading import Place, Reading, dense_of, steps
from tersor.hf.compress.request import Progress, Request, no_progress
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, read_matrix
from tersor.numerics.settings import pinned
from tersor.planning.calibration import Calibration, hessian_of, shared
from tersor.planning.plan import Choice, check_weights, tempered
from tersor.planning.trials import Trials
from tersor.quality import Quality, measure

SURVEY_ELEMENTS = 1 << 16  # elements of a matrix that a trial encodes
SURVEY_TOKENS = 1 << 14  # of the text, by which trials are weighed: four times as many choose no better (docs/log.md)


@exclusive("output")
def run(source: Source, calibration: Calibration | None, request: Request, output: Path, *, device: str = "cpu",
        reading: Reading | None = None, crew: Crew | None = None,
        progress: Progress = no_progress) -> dict[str, list[Choice]]:
    """Encode every matrix with every rung near the budget; one JSON line a trial in `output`, resumed if there.

    The cost of a choice is its relative distortion times the matrix's weight: what the request says, else the Fisher
    estimate of the KL, `tempered`, else the matrix's share of the elements. Surveys run without error feedback, which
    lowers all rungs of a matrix by about the same factor, and large matrices are tried on evenly spaced rows only; but
    where one of the rungs is spectral (low rank), neither shortcut is fair: all of them take every row, and feedback if
    wanted.

    Parameters
    ----------
    calibration : Calibration or None
        What is known of the text; its moments, unless `reading` brings them.
    reading : Reading or None
        Text that is run through the dense model: a block's matrices are tried while its moments are there. Those of
        what lies outside of the blocks are kept beside `output`; see `outside`.
    crew : Crew or None
        Who makes the trials; None: the device.
    """
    given = check_weights(list(source.layout.matrices), request.sensitivities)
    check_options(request)
    known = open_trials(source, calibration, request, output)
    rate, matrices = 8 * request.budget / source.elements, source.layout.matrices
    tried = {name: rungs(request, matrix.shape, rate) for name, matrix in matrices.items()}

    def missing(name: str) -> list[Codec]:
        return [codec for codec in tried[name] if known.find(name, codec.spec()) is None]

    def whole(matrix: Matrix) -> bool:
        return any(codec.traits().spectral for codec in tried[matrix.name])

    def what(matrix: Matrix, codecs: Sequence[Codec]) -> Tried:
        return Tried.of(source, matrix, codecs, calibration, request, whole=whole(matrix))

    def tasks(matrix: Matrix, dense: Tensor, seen: Calibration) -> list[Task]:
        hessian, apart = hessian_of(seen, matrix.name, str(dense.device)), dict[Codec, list[Codec]]()
        for codec in missing(matrix.name):
            apart.setdefault(codec if whole(matrix) else stand_in(codec, matrix.shape)[0], []).append(codec)
        return [_task(what(matrix, together), dense, hessian) for together in apart.values()]

    hands = crew or Hands([torch.device(device)])
    if reading is None or calibration is None:
        wanted = [_alone(what(m, missing(m.name)), source, m, calibration, device) for m in matrices.values()
                  if missing(m.name)]
        _one_by_one(hands, wanted, known, progress)
    else:
        by_blocks(reading, calibration, output, lambda m: bool(missing(m.name)), Work(hands, known, tasks), progress)
    found = {name: [(codec, known.find(name, codec.spec()) or {}) for codec in tried[name]] for name in matrices}
    weights = tempered({name: lines[0][1]["weight"] for name, lines in found.items()},
                       {name: math.prod(matrix.shape) for name, matrix in matrices.items()}) | given
    return {name: [Choice(codec, line["nbytes"], line["distortion"] * weights[name]) for codec, line in lines]
            for name, lines in found.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Trials of a block: who makes them, where they are written, and what is to be made of a matrix."""

    crew: Crew
    known: Trials
    tasks: Callable[[Matrix, Tensor, Calibration], list[Task]]

    def on(self, listed: Sequence[tuple[Matrix, Tensor]], seen: Calibration) -> None:
        """Try matrices (out, in); each trial is written as soon as it is made."""
        for _, records in self.crew.each([task for matrix, dense in listed for task in
                                          self.tasks(matrix, dense, seen)]):
            for record in records:
                self.known.add(record)


def _one_by_one(crew: Crew, tasks: Sequence[Task], known: Trials, progress: Progress) -> None:
    progress("survey", 0, len(tasks))
    for number, (_, records) in enumerate(crew.each(tasks)):
        for record in records:
            known.add(record)
        progress("survey", number + 1, len(tasks))


def _task(tried: Tried, dense: Tensor, hessian: Tensor | None) -> Task:
    return Task(tried.matrix, trials, lambda: (tried, tried.part(dense)), _cost(tried), (hessian,))


def _alone(tried: Tried, source: Source, matrix: Matrix, calibration: Calibration | None, device: str) -> Task:
    def ready() -> tuple[Tried, Tensor, Tensor | None]:
        return (tried, tried.part(read_matrix(source, matrix, device)),
                hessian_of(calibration, matrix.name, device))

    return Task(matrix.name, trials, ready, len(tried.codecs) * _cost(tried))


def _cost(tried: Tried) -> int:
    elements = tried.shape[0] * tried.shape[1]
    return elements if tried.whole else min(elements, 2 * SURVEY_ELEMENTS)


class Tries(Protocol):
    """What makes the trials of a block; see `Work`."""

    def on(self, listed: Sequence[tuple[Matrix, Tensor]], seen: Calibration) -> None:
        """Try matrices (out, in) under the moments that were seen."""
        ...


def by_blocks(reading: Reading, calibration: Calibration, output: Path, missing: Callable[[Matrix], bool], work: Tries,
              progress: Progress) -> None:
    """Run text through the dense model; work on the matrices of a block that miss trials while it is resident."""
    file = beside(output)
    if not any(map(missing, reading.source.layout.matrices.values())) and outside(file, reading.mark) is not None:
        return
    streamed = reading.streamed()
    last = len(streamed.blocks)
    first = next((stage for stage in range(last) if any(map(missing, streamed.matrices(stage)))), last)
    flow = reading.flow(streamed, "survey", SURVEY_TOKENS)
    place = Place(Checkpoint(part_of(output), reading.mark), flow)
    step = steps(last + 1, flow.tokens, lambda done, total: progress("survey", done, total))
    for stage in range(place.resume(first), last + 1):
        reading.position[:] = stage, last
        with streamed.resident(stage):
            wanted = stage == last or any(map(missing, streamed.matrices(stage)))
            moments = flow.through(stage, watch=wanted, keep=True, step=lambda done, stage=stage: step(stage, done))
            work.on([(matrix, dense_of(streamed, matrix)) for matrix in streamed.matrices(stage) if missing(matrix)],
                    dataclasses.replace(calibration, hessians=moments))
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
    flow, last = reading.flow(streamed, "outside", SURVEY_TOKENS), len(streamed.blocks)
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


@dataclasses.dataclass(frozen=True)
class Tried:
    """What is tried on a matrix, wherever that is done.

    Attributes
    ----------
    matrix : str
    shape : (int, int)
    share : float
        Of the model's elements.
    codecs : tuple of Codec
    trace : float or None
        Of the Fisher matrix.
    seed : int
    options : mapping
        Of encoders.
    whole : bool
        Every row, with feedback, is encoded: one of the matrix's rungs is spectral.
    """

    matrix: str
    shape: tuple[int, int]
    share: float
    codecs: tuple[Codec, ...]
    trace: float | None
    seed: int
    options: Mapping[str, Any]
    whole: bool

    @classmethod
    def of(cls, source: Source, matrix: Matrix, codecs: Sequence[Codec], calibration: Calibration | None,
           request: Request, *, whole: bool = False) -> Tried:
        """Return what is tried for a request."""
        trace = None if calibration is None else calibration.fisher.get(matrix.name)
        return cls(matrix.name, matrix.shape, matrix.shape[0] * matrix.shape[1] / source.elements, tuple(codecs), trace,
                   request.seed, request.options, whole)

    def part(self, dense: Tensor) -> Tensor:
        """Return the rows of a matrix that are encoded."""
        return dense if self.whole else sampled(dense)


def trials(what: Tried, given: Tensor, hessian: Tensor | None = None) -> list[dict[str, Any]]:
    """Encode what is tried of a matrix, `given` (rows, in), with each codec; return the survey's lines.

    A sample of its rows goes without error feedback, and with a codec that stands in where encoding is long, once for
    all that it stands in for; the whole matrix with feedback.
    """
    dense, found, made = given.to(torch.float32), [], dict[Codec, Quality]()
    with pinned():  # the plan follows from these figures, so they must not depend on the threads
        weight = what.share if what.trace is None else sensitivity.weight(what.trace, dense, hessian)
        white = sensitivity.white(dense, hessian)
    for codec in what.codecs:
        tried, factor = (codec, 1.0) if what.whole else stand_in(codec, (dense.shape[0], dense.shape[1]))
        if tried not in made:
            made[tried] = _quality(what, tried, dense, hessian)
        relative = factor * made[tried].relative_error
        distortion = made[tried].distortion if tried is codec else sensitivity.distortion(relative, white)
        found.append({"matrix": what.matrix, "codec": codec.spec(), "nbytes": codec.nbytes(what.shape),
                      "distortion": distortion, "relative_error": relative, "weight": weight})
    return found


def _quality(what: Tried, tried: Codec, dense: Tensor, hessian: Tensor | None) -> Quality:
    """Encode float32 numbers with a codec; return how far it is off."""
    options = fixed_options(tried, what.options if what.whole else {**what.options, "feedback": False},
                            calibrated=what.whole and hessian is not None)
    tables = tried.train([dense], seed=what.seed)
    with pinned():
        encoded = tried.encode(dense, hessian=hessian if what.whole else None, seed=what.seed, options=options,
                               tables=tables)
        return measure(dense, encoded, hessian)
