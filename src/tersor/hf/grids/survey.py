"""What each scheme costs on each matrix: encoded with feedback, on evenly spaced rows, and measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import tersor
from tersor.grids.encode import decode, encode
from tersor.grids.scheme import Scheme
from tersor.grids.solve import Effort, Metric
from tersor.hf.compress import sensitivity, survey
from tersor.hf.compress.reading import Reading
from tersor.hf.compress.request import Progress
from tersor.hf.grids.encodable import siblings
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, read_matrix
from tersor.numerics.settings import pinned
from tersor.planning.calibration import Calibration
from tersor.planning.trials import Trials
from tersor.quality import compare

SPAN = (0.6, 2.0)  # bits of schemes tried, as multiples of the rate asked for
EFFORT = Effort(0, 0)
READS = "-"  # in place of a scheme: the line that says with which matrix one shares its input


@dataclasses.dataclass(frozen=True)
class Tried:
    """What a survey has found.

    Attributes
    ----------
    costs : mapping of str to mapping of Scheme to float
        Estimated nats of KL a token, by matrix and scheme.
    leaders : mapping of str to str
        The first of the matrices that read the same input, by matrix.
    """

    costs: Mapping[str, Mapping[Scheme, float]]
    leaders: Mapping[str, str]


class Metrics:
    """Metrics of Hessians: matrices that follow one another often share it."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Metric] | None = None

    def of(self, hessian: Tensor | None) -> Metric | None:
        """Return the metric of a Hessian, if there is one."""
        if hessian is None:
            return None
        if self._held is None or self._held[0].data_ptr() != hessian.data_ptr():
            self._held = None
            with pinned():
                self._held = hessian, Metric.of(hessian)
        return self._held[1]


def near(schemes: Sequence[Scheme], shape: tuple[int, int], rate: float) -> list[Scheme]:
    """Return the schemes worth trying on a matrix when its weights are to have `rate` bits; always the least."""
    sized = sorted(schemes, key=lambda scheme: (scheme.nbytes(shape), scheme))
    low, high = SPAN[0] * rate, max(SPAN[1] * rate, 4.5)
    return [scheme for scheme in sized if scheme is sized[0] or low <= scheme.bits <= high]


def run(source: Source, known: Calibration | None, ladders: Mapping[str, Sequence[Scheme]], output: Path, *,
        reading: Reading | None, device: str, mark: Any, progress: Progress) -> Tried:
    """Try every matrix's schemes; one JSON line a trial in `output`, from which a killed run goes on.

    Parameters
    ----------
    known : Calibration or None
        Sensitivities, where there is text.
    ladders : mapping of str to sequence of Scheme
        What is tried, by matrix.
    """
    matrices = list(source.layout.matrices.values())
    work = _Work(source, known, ladders, _open(output, mark))
    if reading is None or known is None:
        for number, matrix in enumerate(matrices):
            progress("survey", number, len(matrices))
            if work.missing(matrix):
                work.one(matrix, read_matrix(source, matrix, device), None)
        progress("survey", len(matrices), len(matrices))
    else:
        survey.by_blocks(reading, known, output, lambda m: bool(work.missing(m)), work, progress)
    return work.found()


class _Work:
    """The trials of a run."""

    def __init__(self, source: Source, known: Calibration | None, ladders: Mapping[str, Sequence[Scheme]],
                 trials: Trials) -> None:
        self._source, self._known, self._ladders, self._trials = source, known, ladders, trials
        self._metrics = Metrics()

    def missing(self, matrix: Matrix) -> list[Scheme]:
        """Return the schemes that a matrix has yet to be tried with."""
        return [scheme for scheme in self._ladders[matrix.name] if self._trials.find(matrix.name, scheme.name) is None]

    def on(self, listed: Sequence[tuple[Matrix, Tensor]], seen: Calibration) -> None:
        """Try the matrices of a block."""
        for matrix, dense in listed:
            self.one(matrix, dense, seen)

    def one(self, matrix: Matrix, dense: Tensor, seen: Calibration | None) -> None:
        """Try a matrix (out, in), and say with which it shares its input."""
        held = {} if seen is None else seen.hessians
        hessian, sample = held.get(matrix.name), survey.sampled(dense)
        if hessian is not None and self._trials.find(matrix.name, READS) is None:
            leader = next(name for name, other in held.items() if other is hessian)
            self._trials.add({"matrix": matrix.name, "scheme": READS, "distortion": 0.0, "weight": 0.0,
                              "reads": leader})
        for scheme in self.missing(matrix):
            self._trials.add(_trial(self._source, matrix, scheme, sample, (self._known, hessian, self._metrics)))

    def found(self) -> Tried:
        """Return what was found of all matrices."""
        costs: dict[str, dict[Scheme, float]] = {}
        leaders = siblings(self._source.layout.matrices.values())
        for name, ladder in self._ladders.items():
            lines = [(scheme, self._trials.find(name, scheme.name) or {}) for scheme in ladder]
            costs[name] = {scheme: line["distortion"] * line["weight"] for scheme, line in lines}
            reads = self._trials.find(name, READS)
            leaders[name] = leaders[name] if reads is None else str(reads["reads"])
        return Tried(costs, leaders)


def _trial(source: Source, matrix: Matrix, scheme: Scheme, sample: Tensor,
           seen: tuple[Calibration | None, Tensor | None, Metrics]) -> dict[str, Any]:
    known, hessian, metrics = seen
    tensors = encode(scheme, sample, metrics.of(hessian), EFFORT)
    errors = compare(sample, decode(scheme, tensors, sample.shape[1]), hessian)
    trace = None if known is None else known.fisher.get(matrix.name)
    elements = matrix.shape[0] * matrix.shape[1]
    with pinned():
        weight = elements / source.elements if trace is None else sensitivity.weight(trace, sample, hessian)
    return {"matrix": matrix.name, "scheme": scheme.name, "distortion": errors.distortion, "weight": weight}


def _open(file: Path, mark: Any) -> Trials:
    text = json.dumps([tersor.__version__, survey.SURVEY_ELEMENTS, dataclasses.asdict(EFFORT), mark], sort_keys=True)
    return Trials(file, "survey", hashlib.sha256(text.encode()).hexdigest(), key=("matrix", "scheme"),
                  numbers=("distortion", "weight"), hint="this model with this calibration")
