"""Stage 4: encode one matrix at a time, then write the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tersor import store
from tersor.contract.codec import Encoded
from tersor.hf.compress.checkpoint import Checkpoint
from tersor.hf.compress.course import Course
from tersor.hf.compress.crew import Crew, Hands
from tersor.hf.compress.desk import Desk, Job, Puts, Wanted, decode_into, read_payload
from tersor.hf.compress.moving import Moving, Tally
from tersor.hf.compress.plan import check_plan, entries
from tersor.hf.compress.reading import Place, Reading, dense_of
from tersor.hf.compress.request import Progress, no_progress
from tersor.hf.compress.survey import beside, outside_of
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import read_matrix
from tersor.hf.models.streamed import Streamed
from tersor.numerics.memory import give_back
from tersor.planning.calibration import hessian_of

RIDGE = 1.0  # times the mean square of an input: what holds a matrix to the dense one, see docs/log.md


def run(job: Job, work: WorkFolder, *, device: str = "cpu", reading: Reading | None = None,
        crew: Crew | None = None, progress: Progress = no_progress,
        kept: Mapping[str, Callable[[], Encoded]] | None = None, course: Course | None = None) -> dict[str, Any]:
    """Encode one matrix at a time into the work folder, then write the store there as `output`; return the report.

    A killed run continues from the last finished matrix, and gives the same bytes as an unbroken one.

    Parameters
    ----------
    reading : Reading or None
        Text that is run through the blocks as they are encoded, so that each is calibrated on what it will be given;
        without it, moments are those of the job's calibration.
    crew : Crew or None
        Who encodes; None: the device.
    kept : mapping or None
        Matrices that are encoded already, and stored as they are: name to what reads one.
    course : Course or None
        What is trained on between encodings, under a reading.
    """
    source, picks = job.source, job.picks
    check_plan(source, picks)
    tally = Tally(progress, 0 if course is None else course.between.steps)
    desk = Desk(job, work / "matrices", tally.encoded, crew or Hands([torch.device(device)]))
    for name, held in (kept or {}).items():
        desk.keep(name, held(), read_matrix(source, source.layout.matrices[name], "cpu"))
    if reading is None:
        desk.encode([_alone(job, source.layout.matrices[name], device) for name in picks])
    elif course is None:
        by_blocks(desk, reading, work)
    else:
        Moving(desk, reading, course, work, tally.trained).run()

    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        return {"": source.tensor(entry.name)} if entry.codec is None else read_payload(desk.files[entry.name])

    shutil.rmtree(work / "output", ignore_errors=True)  # of a run that was killed before it was verified
    store.write(work / "output", entries(source, picks), payload, kind="model", provenance=job.provenance,
                files=source.stored_files())
    return {name: desk.report[name] for name in picks}


def by_blocks(desk: Puts, reading: Reading, work: WorkFolder) -> None:
    """Encode block by block, each on what the blocks before it give once they are encoded.

    A matrix is encoded as the one that makes of those inputs what the dense matrix makes of its own. Embeddings come
    first, by the moments that the dense model's head has seen where they are tied to it; what else lies outside of the
    blocks comes last.
    """
    ends = outside_of(reading, beside(work / "survey.jsonl"))
    original = reading.streamed()
    last = len(original.blocks)
    tables = [m for m in original.matrices(last) if original.looks_up(m)]
    _encode(desk, original, tables, (ends, {}))  # the largest, as a rule: before there is room taken for another model
    give_back()
    encoded = reading.streamed(like=original)
    decode_into(encoded, desk, tables)
    dense, flow = reading.flow(original, "dense"), reading.flow(encoded, "encoded")
    place = Place(Checkpoint(work / "encode.part", desk.mark), dense, flow)
    first = next((stage for stage in range(last) if not _finished(desk, encoded.matrices(stage))), last)
    listed = [[m for m in encoded.matrices(stage) if m not in tables] for stage in range(last + 1)]
    ends = last + 1 if listed[last] else last  # of what follows the blocks, nothing may be left to encode
    for stage in range(place.resume(first), ends):
        reading.position[:] = stage, last
        matrices, onward = listed[stage], stage + 1 < ends
        with original.resident(stage), encoded.resident(stage):
            moments: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = {}, {}
            if not _finished(desk, matrices):
                moments = flow.beside(dense, stage, keep=onward)
            elif onward:
                dense.through(stage, watch=False, keep=True)
            give_back()  # what the pass took, or encoders find it taken
            _encode(desk, original, matrices, moments)
            if onward:
                decode_into(encoded, desk, matrices)
                flow.through(stage, watch=False, keep=True)
        place.passed(stage)
    place.drop()
    for name in ("dense", "encoded"):
        shutil.rmtree(reading.folder / name, ignore_errors=True)


def _finished(desk: Puts, matrices: Iterable[Matrix]) -> bool:
    return all([desk.finished(m.name) for m in matrices])


def _encode(desk: Puts, original: Streamed, matrices: Iterable[Matrix],
            moments: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> None:
    """Encode matrices, by moments of their inputs and with those of the dense model."""
    device = original.hollow.device
    own, change = ({name: tensor.to(device) for name, tensor in held.items()} for held in moments)
    desk.encode([Wanted(m.name, lambda m=m: (dense_of(original, m),), (own.get(m.name), change.get(m.name)),
                        m.name in own, RIDGE) for m in matrices])


def _alone(job: Job, matrix: Matrix, device: str) -> Wanted:
    def given() -> tuple[Tensor | None, ...]:
        return read_matrix(job.source, matrix, device), hessian_of(job.calibration, matrix.name, device)

    return Wanted(matrix.name, given, (), job.calibration is not None and matrix.name in job.calibration.hessians)
