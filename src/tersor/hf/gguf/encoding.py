"""Tensors into their types, one at a time, each kept in the work folder; then the file, from what was kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor
from tersor.contract.checks import check_matrix
from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, tell_damaged
from tersor.gguf import file, plan
from tersor.gguf.encode import encode
from tersor.gguf.file import Entry
from tersor.gguf.types.base import BlockType, CodedType
from tersor.hf.compress.request import Progress
from tersor.hf.gguf.errors import measured
from tersor.hf.gguf.inputs import Known, rows_of
from tersor.hf.gguf.origin import Item, Origin

PART = 1 << 24  # weights of a plain tensor that are copied at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A plan, and what it is carried out with.

    Attributes
    ----------
    origin : Origin
    types : mapping of str to BlockType
    known : Known
    rounds : int
        Of fitting scales and feedback in turn.
    sweeps : int
        Over all levels at the end, with an eye on other rows.
    mark : Any
        JSON-able: what the bytes depend on besides tensor and type.
    """

    origin: Origin
    types: Mapping[str, BlockType]
    known: Known
    rounds: int
    sweeps: int
    mark: Any


def run(job: Job, folder: Path, target: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """Encode every tensor that has a type of blocks into `folder`, write the file `target`; return the report's lines.

    A killed run goes on after the last finished tensor, and gives the same bytes as an unbroken one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict[str, Any]] = {}
    places: dict[str, Path] = {}
    total = len(job.origin.items)
    for number, item in enumerate(job.origin.items):
        progress("encode", number, total)
        name, kind = item.entry.name, job.types[item.entry.name]
        if isinstance(kind, CodedType):
            places[name] = folder / f"{number:06d}.safetensors"
            report[name] = _finished(places[name], _stamp(job, name)) or _encode(job, item, kind, places[name])
        else:
            nbytes = kind.tensor_nbytes(item.entry.elements)
            report[name] = {"type": kind.name, "shape": list(item.entry.shape), "nbytes": nbytes, "relative_error": 0.0}
    progress("encode", total, total)
    entries = [item.entry for item in job.origin.items]
    pairs = plan.finished(job.origin.pairs, entries, job.types)
    file.write(target, pairs, plan.typed(entries, job.types), plan.sizes(entries, job.types), _payload(job, places))
    return report


def _encode(job: Job, item: Item, kind: CodedType, place: Path) -> dict[str, Any]:
    matrix, name = rows_of(item), item.entry.name
    check_matrix(matrix, name)
    stored = encode(kind, matrix, job.known.inputs(item), job.rounds, job.known.across(item, job.sweeps))
    errors = measured(kind, stored, matrix, job.known.hessian(item))
    found = {"type": kind.name, "shape": list(item.entry.shape), "nbytes": stored.numel(),
             "relative_error": errors.relative, "distortion": errors.distortion}
    save_sealed({"blocks": stored}, place, {"job": _stamp(job, name), "report": found})
    return found


def _stamp(job: Job, name: str) -> str:
    told = [tersor.__version__, job.mark, name, job.types[name].name, job.rounds, job.sweeps]
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(place: Path, stamp: str) -> dict[str, Any] | None:
    """Return the report of a finished tensor; None if there is none, it is damaged, or another job's."""
    if not place.exists():
        return None
    try:
        record = load_sealed(place)[1]
    except CorruptStoreError as error:
        tell_damaged(error)
        return None
    return record["report"] if record.get("job") == stamp else None


def _payload(job: Job, places: Mapping[str, Path]) -> Callable[[Entry], Iterable[Tensor]]:
    items = {item.entry.name: item for item in job.origin.items}

    def payload(entry: Entry) -> Iterable[Tensor]:
        if entry.name in places:
            return [load_sealed(places[entry.name])[0]["blocks"]]
        numbers = items[entry.name].read().reshape(-1)
        return (part.contiguous().view(torch.uint8) for part in numbers.split(PART))
    return payload
