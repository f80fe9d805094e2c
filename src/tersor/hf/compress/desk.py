"""Where matrices are encoded one by one, and what is finished is put down for a run that goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded
from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, seal, tell_damaged
from tersor.hf.compress.crew import Crew, Task
from tersor.hf.compress.method import fixed_options
from tersor.hf.compress.request import Progress, Request
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source
from tersor.hf.models.streamed import Streamed
from tersor.numerics.settings import pinned
from tersor.planning.calibration import Calibration, compensated
from tersor.planning.plan import to_json
from tersor.quality import measure

MOVED = "moved"  # in a line of the report: how far the encoded matrix was from the source's, squared, over its square


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A plan and what it is carried out with.

    Attributes
    ----------
    source : Source
    picks : mapping of str to Codec
        The plan.
    calibration : Calibration or None
    request : Request
    provenance : mapping
        For the manifest.
    """

    source: Source
    picks: Mapping[str, Codec]
    calibration: Calibration | None
    request: Request
    provenance: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """A matrix to be encoded.

    Attributes
    ----------
    name : str
    given : callable
        Returns the matrix (out, in); and its Hessian, where `needs` does not bring it.
    needs : tuple of Tensor or None
        Its Hessian, `E[y yᵀ]`; `E[(x - y) yᵀ]`, where the matrix shall make of inputs y what it makes of x; and what
        is encoded in its place, where recovery has moved it.
    calibrated : bool
        Whether there is a Hessian.
    ridge : float
        See `planning.calibration.compensated`.
    """

    name: str
    given: Callable[[], tuple[Tensor | None, ...]]
    needs: tuple[Tensor | None, ...]
    calibrated: bool
    ridge: float = 0.0


@dataclasses.dataclass(frozen=True)
class Order:
    """How a matrix is to be encoded, wherever that is done."""

    name: str
    codec: Codec
    seed: int
    options: Mapping[str, Any]
    ridge: float


class Puts(Protocol):
    """Where matrices are encoded one by one, and put down when they are finished; see `Desk`."""

    @property
    def mark(self) -> str:
        """A digest of what all matrices depend on."""
        ...

    def finished(self, name: str) -> bool:
        """Return whether a matrix is there already."""
        ...

    def encode(self, wanted: Sequence[Wanted]) -> None:
        """Encode matrices, those that are not there."""
        ...

    def decoded(self, name: str, device: torch.device) -> Tensor:
        """Return a finished matrix as it decodes, (out, in)."""
        ...


def decode_into(model: Streamed, desk: Puts, matrices: Iterable[Matrix]) -> None:
    """Let a model compute with finished matrices as they decode, those that it holds."""
    hollow = model.hollow
    for matrix in matrices:
        if not hollow.parameter(matrix.parameter).is_meta:
            model.put(matrix, desk.decoded(matrix.name, hollow.device))


class Desk:
    """Where matrices are encoded, and put down when they are finished.

    Attributes
    ----------
    files : mapping of str to Path
        Of the payloads, by matrix.
    report : dict of str to dict
        What is finished.
    """

    def __init__(self, job: Job, folder: Path, progress: Progress, crew: Crew) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.job, self.report, self._progress, self._crew = job, dict[str, Any](), progress, crew
        self.files = {name: folder / f"{number:06d}.safetensors" for number, name in enumerate(job.picks)}

    @property
    def mark(self) -> str:
        """A digest of the job, for what belongs to all of its matrices."""
        return seal(_facts(self.job))

    def finished(self, name: str) -> bool:
        """Return whether a matrix is there, as this job would encode it."""
        if name not in self.report:
            known = (False,) if self.job.calibration is None else (False, True)
            found = _finished(self.files[name], {_stamp(self.job, name, self._options(name, calibrated=calibrated))
                                                 for calibrated in known})
            self.report.update({} if found is None else {name: found})
        return name in self.report

    def encode(self, wanted: Sequence[Wanted]) -> None:
        """Encode matrices, but those that are there; each is put down as soon as it is encoded."""
        self._tell()
        tasks = [self._task(one) for one in wanted if not self.finished(one.name)]
        for task, (tensors, found) in self._crew.each(tasks):
            name, options = task.name, found["options"]
            save_sealed(tensors, self.files[name], {"job": _stamp(self.job, name, options), "report": found})
            self.report[name] = found
            self._tell()

    def _tell(self) -> None:
        self._progress("encode", len(self.report), len(self.job.picks))

    def _task(self, one: Wanted) -> Task:
        codec, shape = self.job.picks[one.name], self.job.source.layout.matrices[one.name].shape
        order = Order(one.name, codec, self.job.request.seed, self._options(one.name, calibrated=one.calibrated),
                      one.ridge)
        return Task(one.name, encode_order, lambda: (order, *one.given()), shape[0] * shape[1], one.needs)

    def keep(self, name: str, encoded: Encoded, dense: Tensor) -> None:
        """Put down a matrix that was encoded before, as it is; `dense` is what errors are measured against."""
        if not self.finished(name):
            options = self._options(name, calibrated=False)
            found = measured(dense, encoded, None, options)
            save_sealed(encoded.tensors, self.files[name], {"job": _stamp(self.job, name, options), "report": found})
            self.report[name] = found

    def decoded(self, name: str, device: torch.device) -> Tensor:
        """Return a finished matrix as it decodes, float32 (out, in)."""
        tensors = {key: tensor.to(device) for key, tensor in read_payload(self.files[name]).items()}
        with pinned():  # what is encoded later depends on it, and must not depend on threads
            return Encoded(self.job.picks[name], self.job.source.layout.matrices[name].shape, tensors).decode()

    def _options(self, name: str, *, calibrated: bool) -> dict[str, Any]:
        return fixed_options(self.job.picks[name], self.job.request.options, calibrated=calibrated)


def _facts(job: Job) -> list[Any]:
    """Return what all matrices of a job depend on; under a text, each depends on how those before it are encoded."""
    known = job.calibration
    plan = to_json(job.picks) if known is not None and not known.hessians else None
    return [dict(job.provenance), None if known is None else known.sha256, plan]


def _stamp(job: Job, name: str, options: Mapping[str, Any]) -> str:
    codec = job.picks[name]
    return seal([*_facts(job), name, codec.to_config(), dict(options)])


def encode_order(order: Order, dense: Tensor, hessian: Tensor | None = None,
                 change: Tensor | None = None, moved: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode a matrix to order, or what it was moved to; return its payload and its line of the report."""
    aim = moved
    if hessian is not None and change is not None:
        with pinned():
            aim = compensated(dense, change, hessian, order.ridge, moved)
    encoded, found = encode_matrix(dense, order.codec, hessian, order.seed, order.options, order.name, aim=aim)
    if moved is not None:
        away = [part.square().sum(dtype=torch.float64) for part in (moved - dense, dense.to(torch.float32))]
        found[MOVED] = float(away[0] / away[1])
    return {key: tensor.cpu() for key, tensor in encoded.tensors.items()}, found


def encode_matrix(dense: Tensor, codec: Codec, hessian: Tensor | None, seed: int, options: Mapping[str, Any],
                  name: str, *, aim: Tensor | None = None) -> tuple[Encoded, dict[str, Any]]:
    """Encode one matrix, check the payload and measure it; return it with its line of the report.

    Parameters
    ----------
    aim : Tensor or None
        What is encoded in place of the matrix, (out, in); what is measured is the error against the matrix.
    """
    given = dense if aim is None else aim
    tables = codec.train([given], seed=seed)
    encoded = codec.encode(given, hessian=hessian, seed=seed, options=options, tables=tables).check(name)
    return encoded, measured(dense, encoded, hessian, options)


def measured(dense: Tensor, encoded: Encoded, hessian: Tensor | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of the report on an encoded matrix (out, in)."""
    quality = measure(dense, encoded, hessian)
    return {
        "codec": encoded.codec.spec(), "shape": list(encoded.shape), "nbytes": encoded.nbytes, "rate": encoded.rate,
        "relative_error": quality.relative_error, "distortion": quality.distortion, "sqnr_db": quality.sqnr,
        "shannon_gap_db": quality.shannon_gap, "options": dict(options)}


def _finished(file: Path, stamps: Collection[str]) -> dict[str, Any] | None:
    """Return the report of a finished matrix; None if there is none, it is damaged, or another job's."""
    if not file.exists():
        return None
    try:
        record = load_sealed(file)[1]
    except CorruptStoreError as error:
        tell_damaged(error)
        return None
    return record["report"] if record.get("job") in stamps else None


def read_payload(file: Path) -> dict[str, Tensor]:
    """Read one finished matrix's payload from the work folder.

    Raises
    ------
    CorruptStoreError
        If it has been damaged since it was finished; the next run makes it again.
    """
    try:
        return load_sealed(file)[0]
    except CorruptStoreError as error:
        raise CorruptStoreError(f"{error}; run again, and this matrix is encoded again") from error
