"""Where matrices are encoded into schemes one by one, and what is finished is put down for a run that goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor
from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, seal, tell_damaged
from tersor.grids.encode import decode, encode
from tersor.grids.scheme import Scheme
from tersor.grids.solve import Effort
from tersor.hf.compress.desk import Wanted
from tersor.hf.compress.request import Progress
from tersor.hf.compress.sides import Sides
from tersor.hf.grids.survey import Metrics
from tersor.hf.models.source import Source
from tersor.numerics.settings import pinned
from tersor.planning.calibration import compensated
from tersor.quality import compare


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A plan, and what it is carried out with.

    Attributes
    ----------
    source : Source
    picks : mapping of str to Scheme
        By matrix.
    effort : Effort
    dtype : torch.dtype
        Of scales.
    mark : Any
        JSON-able: what the bytes depend on besides these.
    sides : Sides or None
        How errors of rows add up.
    """

    source: Source
    picks: Mapping[str, Scheme]
    effort: Effort
    dtype: torch.dtype
    mark: Any
    sides: Sides | None = None


class GridDesk:
    """Where matrices are encoded, and put down when they are finished; what `compress` has in `Desk`.

    Attributes
    ----------
    files : mapping of str to Path
        By matrix.
    report : dict of str to dict
        What is finished.
    """

    def __init__(self, job: Job, folder: Path, progress: Progress) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.job, self.report, self._progress = job, dict[str, Any](), progress
        self.files = {name: folder / f"{number:06d}.safetensors" for number, name in enumerate(job.picks)}
        self._metrics = Metrics()

    @property
    def mark(self) -> str:
        """A digest of what all matrices depend on: each is encoded behind those before it."""
        plan = {name: scheme.name for name, scheme in self.job.picks.items()}
        return seal([tersor.__version__, self.job.mark, plan, dataclasses.asdict(self.job.effort), str(self.job.dtype)])

    def finished(self, name: str) -> bool:
        """Return whether a matrix is there, as this job would encode it."""
        if name not in self.report and self.files[name].exists():
            try:
                record = load_sealed(self.files[name])[1]
                self.report.update({name: record["report"]} if record.get("job") == self._stamp(name) else {})
            except CorruptStoreError as error:
                tell_damaged(error)
        return name in self.report

    def encode(self, wanted: Sequence[Wanted]) -> None:
        """Encode matrices, those that are not there; errors are those against the matrix, not against its aim."""
        for one in wanted:
            self._encode(one)

    def _encode(self, one: Wanted) -> None:
        name = one.name
        self._progress("encode", len(self.report), len(self.files))
        if not self.finished(name):
            given, metric, change = (*one.given(), *one.needs, None, None)[:3]
            assert given is not None
            aim = given
            if metric is not None and change is not None:
                with pinned():
                    aim = compensated(given, change, metric, one.ridge)
            scheme = self.job.picks[name]
            sides = None if self.job.sides is None else self.job.sides.of(name, aim.device)
            tensors = encode(scheme, aim, self._metrics.of(metric), self.job.effort, self.job.dtype, sides)
            errors = compare(given, decode(scheme, tensors, given.shape[1]), metric)
            shape = self.job.source.layout.matrices[name].shape
            found = {"scheme": scheme.name, "shape": list(shape), "nbytes": scheme.nbytes(shape),
                     "relative_error": errors.relative, "distortion": errors.distortion}
            save_sealed(tensors, self.files[name], {"job": self._stamp(name), "report": found})
            self.report[name] = found
        self._progress("encode", len(self.report), len(self.files))

    def decoded(self, name: str, device: torch.device) -> Tensor:
        """Return a finished matrix as it decodes, float32 (out, in)."""
        tensors = {key: tensor.to(device) for key, tensor in self.tensors(name).items()}
        with pinned():
            return decode(self.job.picks[name], tensors, self.job.source.layout.matrices[name].shape[1])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a finished matrix.

        Raises
        ------
        CorruptStoreError
            If they have been damaged since; the next run makes them again.
        """
        try:
            return load_sealed(self.files[name])[0]
        except CorruptStoreError as error:
            raise CorruptStoreError(f"{error}; run again, and this matrix is encoded again") from error

    def _stamp(self, name: str) -> str:
        return seal([self.mark, name])
