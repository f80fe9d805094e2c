"""Stage 4: encode one matrix at a time, then write the store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor import store
from tersor.contract.codec import Codec, Encoded
from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, tell_damaged
from tersor.hf.compress.method import fixed_options
from tersor.hf.compress.plan import check_plan, entries
from tersor.hf.compress.request import Progress, Request, no_progress
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.source import Source, read_matrix
from tersor.planning.calibration import Calibration, hessian_of
from tersor.quality import measure


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


def run(job: Job, work: WorkFolder, *, device: str = "cpu", progress: Progress = no_progress) -> dict[str, Any]:
    """Encode one matrix at a time into the work folder, then write the store there as `output`; return the report.

    A killed run continues from the last finished matrix, and gives the same bytes as an unbroken one.
    """
    source, picks, calibration, request = job.source, job.picks, job.calibration, job.request
    check_plan(source, picks)
    folder = work / "matrices"
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for number, (name, codec) in enumerate(picks.items()):
        progress("encode", number, len(picks))
        files[name] = folder / f"{number:06d}.safetensors"
        matrix = source.layout.matrices[name]
        known = calibration is not None and name in calibration.hessians
        options = fixed_options(codec, request.options, calibrated=known)
        stamp = _stamp(job, name, codec, options)
        found = _finished(files[name], stamp)
        if found is None:
            dense, hessian = read_matrix(source, matrix, device), hessian_of(calibration, matrix.name, device)
            encoded, found = encode_matrix(dense, codec, hessian, request.seed, options, name)
            del dense
            save_sealed(encoded.tensors, files[name], {"job": stamp, "report": found})
        report[name] = found
    progress("encode", len(picks), len(picks))

    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        return {"": source.tensor(entry.name)} if entry.codec is None else read_payload(files[entry.name])

    shutil.rmtree(work / "output", ignore_errors=True)  # of a run that was killed before it was verified
    store.write(work / "output", entries(source, picks), payload, kind="model", provenance=job.provenance,
                files=source.stored_files())
    return report


def _stamp(job: Job, name: str, codec: Codec, options: Mapping[str, Any]) -> str:
    seen = None if job.calibration is None else job.calibration.sha256
    text = json.dumps([dict(job.provenance), seen, name, codec.spec(), codec.version, dict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_matrix(dense: Tensor, codec: Codec, hessian: Tensor | None, seed: int, options: Mapping[str, Any],
                  name: str) -> tuple[Encoded, dict[str, Any]]:
    """Encode one matrix, check the payload and measure it; return it with its line of the report."""
    tables = codec.train([dense], seed=seed)
    encoded = codec.encode(dense, hessian=hessian, seed=seed, options=options, tables=tables).check(name)
    quality = measure(dense, encoded, hessian)
    return encoded, {
        "codec": codec.spec(), "shape": list(encoded.shape), "nbytes": encoded.nbytes, "rate": encoded.rate,
        "relative_error": quality.relative_error, "distortion": quality.distortion, "sqnr_db": quality.sqnr,
        "shannon_gap_db": quality.shannon_gap, "options": dict(options)}


def _finished(file: Path, stamp: str) -> dict[str, Any] | None:
    """Return the report of a finished matrix; None if there is none, it is damaged, or another job's."""
    if not file.exists():
        return None
    try:
        record = load_sealed(file)[1]
    except CorruptStoreError as error:
        tell_damaged(error)
        return None
    return record["report"] if record.get("job") == stamp else None


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
