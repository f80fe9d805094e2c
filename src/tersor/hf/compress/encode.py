"""Stage 4: encode one matrix at a time, then write the store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor import store
from tersor.contract.codec import Codec, Encoded
from tersor.errors import CorruptStoreError
from tersor.files import parse_json, save_tensors
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
        stamp = _stamp(job.provenance, name, codec, options)
        found = _finished(files[name], stamp)
        if found is None:
            dense, hessian = read_matrix(source, matrix, device), hessian_of(calibration, matrix.name, device)
            encoded, found = encode_matrix(dense, codec, hessian, request.seed, options, name)
            del dense
            _keep(files[name], encoded, stamp, found)
        report[name] = found
    progress("encode", len(picks), len(picks))

    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        return {"": source.tensor(entry.name)} if entry.codec is None else read_payload(files[entry.name])

    shutil.rmtree(work / "output", ignore_errors=True)  # of a run that was killed before it was verified
    store.write(work / "output", entries(source, picks), payload, kind="model", provenance=job.provenance,
                files=source.stored_files())
    return report


def _stamp(record: Mapping[str, Any], name: str, codec: Codec, options: Mapping[str, Any]) -> str:
    text = json.dumps([dict(record), name, codec.spec(), codec.version, dict(options)], sort_keys=True)
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


def _keep(file: Path, encoded: Encoded, stamp: str, result: Mapping[str, Any]) -> None:
    """Write a finished matrix to the work folder, whole or not at all."""
    tensors = {key: t.cpu().contiguous() for key, t in encoded.tensors.items()}
    save_tensors(tensors, file, {"job": stamp, "report": json.dumps(result)})


def _finished(file: Path, stamp: str) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            meta = handle.metadata() or {}
        return dict(parse_json(meta["report"])) if meta.get("job") == stamp else None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None  # damaged by a crash of the machine: encode it again


def read_payload(file: Path) -> dict[str, Tensor]:
    """Read one finished matrix's payload from the work folder."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CorruptStoreError(f"{file}: damaged work file; delete it and run again: {error}") from error
