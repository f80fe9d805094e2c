"""`compress_model`: from a model directory to a verified, evaluated, compressed one.

The stages in order: calibrate, survey, plan, encode, verify, evaluate. Each reads files and writes files, in a work
folder beside the output, and reads the model once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import tersor
from tersor import store
from tersor.contract.derived import package_nbytes
from tersor.errors import ModelError, TersorError
from tersor.families import DEFAULT, effort_of
from tersor.files import exclusive, write_json
from tersor.hf.compress import calibrate, card, encode, needs, plan, recover, survey
from tersor.hf.compress.cluster import Cluster, check_engine
from tersor.hf.compress.course import END, MOVES, TOKENS, Course, RecoverSettings
from tersor.hf.compress.crew import Crew, Hands
from tersor.hf.compress.method import check_options, first_rungs
from tersor.hf.compress.reading import Reading, check_numbers
from tersor.hf.compress.request import (
    Progress,
    Request,
    Texts,
    budget_bytes,
    no_progress,
    provenance,
    usable_device,
    usable_devices,
)
from tersor.hf.compress.status import Teller
from tersor.hf.compress.verify import verify_in_fresh_process
from tersor.hf.compress.work import WorkFolder, peak_memory
from tersor.hf.models.classes import check_language_model, check_text, model_class
from tersor.hf.models.dense import copy_dense
from tersor.hf.models.evaluate import evaluate
from tersor.hf.models.samples import samples
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.staging import REPORT
from tersor.hf.models.text import read_ids, text_source
from tersor.numerics.memory import give_back
from tersor.planning.calibration import Calibration
from tersor.planning.plan import check_weights, to_json
from tersor.store.manifest import file_digest


@dataclasses.dataclass(frozen=True)
class CompressSettings(Texts):
    """Everything `compress_model` may be told besides source, output and budget.

    Attributes
    ----------
    method : str
        A family, or one codec string for every matrix.
    dense : tuple of str or None
        Shell patterns of parameters that stay as they are; None: of a model that reads text, what text does not reach,
        such as a vision tower.
    leave_out : tuple of str
        Shell patterns of tensors to leave out, among those that no parameter of the class takes.
    samples : int
        Prompts of the held-out text that both models continue, for the report; none without an evaluation.
    base_model : str or None
        The original's name on a hub, for the model card; None: as its configuration says, if it does.
    effort : str or None
        `"fast"`, `"normal"` or `"best"`: the encoder's work, for methods that read it (`"trellis"`, `"auto"`); None:
        `"normal"`.
    devices : str or None
        Several devices of one kind, in place of `device`: see `usable_devices`. Bytes are those of one.
    engine : str or None
        Who tries and encodes matrices: None: threads of this process; `"ray"`: as many workers of a local Ray cluster
        as there are devices; `"ray:ADDRESS"`: all workers of the cluster there.
    whole : bool
        Keep the whole model in memory while text runs through it, in place of one block at a time.
    recover : bool
        Train what is not encoded yet between encodings, and what is continuous once all is encoded; see `Moving` and
        `recover_model`.
    recover_passes : float
        Times that recovery reads its text between encodings; a third as often at the end.
    recover_tokens : int
        Of the calibration text, at most, that recovery reads.
    recover_blocks : bool
        Train a block at a time, by what it returns: for models that do not fit. Nothing is trained once all is encoded.
    recover_own : float or None
        Share of recovery's text that the original writes itself; None: as `RecoverSettings` has it.
    """

    method: str = DEFAULT
    seed: int = 0
    device: str = "cpu"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sensitivities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dense: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] = ()
    samples: int = 0
    base_model: str | None = None
    effort: str | None = None
    whole: bool = False
    devices: str | None = None
    engine: str | None = None
    recover: bool = False
    recover_passes: float = MOVES
    recover_tokens: int = TOKENS
    recover_blocks: bool = False
    recover_own: float | None = None

    def changed(self) -> dict[str, Any]:
        """Return the fields that are not their defaults; of devices, the kind."""
        default = CompressSettings()
        own = dataclasses.replace(self, device=torch.device(self.device).type, devices=None, engine=None)
        return {field.name: getattr(own, field.name) for field in dataclasses.fields(own)
                if getattr(own, field.name) != getattr(default, field.name)}

    @property
    def places(self) -> tuple[str, ...]:
        """The devices, checked; text runs through the model on the first alone where one is meant."""
        return (usable_device(self.device),) if self.devices is None else usable_devices(self.devices)

    def reading(self, source: Source, folder: Path) -> Reading | None:
        """Return the calibration text as a source reads it, if there is to be any calibration."""
        return Reading.of(source, self.text_seen, self.sampling, folder, devices=self.places,
                          whole=self.whole) if self.calibrated else None

    def crew(self) -> Crew:
        """Return who tries and encodes matrices."""
        devices = [torch.device(place) for place in self.places]
        if self.engine is None:
            return Hands(devices)
        return Cluster(devices, self.engine.partition(":")[2] or None)

    @property
    def recovery(self) -> RecoverSettings | None:
        """How what was compressed is trained, if it is to be."""
        if not (self.recover or self.recover_blocks):
            return None
        moves = self.recover_passes if self.calibrated else 0.0
        return RecoverSettings(self.calibration, self.recover_tokens, END * self.recover_passes, self.context,
                               self.seed, self.device, moves=moves, blocks=self.recover_blocks, own=self.recover_own)


@exclusive("output")
def compress_model(source: str | Path, output: str | Path, rate: float | None = None, *, size: int | None = None,
                   settings: CompressSettings | None = None, progress: Progress = no_progress,
                   **changes: Any) -> dict[str, Any]:
    """Compress a transformers model to a byte budget, verify it, and evaluate it.

    Parameters
    ----------
    source : path
        A transformers directory, or a .gguf file.
    output : path
        New directory; appears only when verified. `OUT.work` beside it keeps calibration, survey and plan.
    rate : float or None
        Bits per parameter over **all** parameters, shards and manifest counted.
    size : int or None
        Bytes of the same files, instead of a rate.
    settings : CompressSettings or None
        Everything else; `**changes` replace its fields (`method="uniform"`, `seed=1`, …).

    Returns
    -------
    dict
        The report: `summary`, `matrices` by name, `ledger` by the checkpoint's key, `evaluation`, `samples`,
        `provenance`; or `copied` and `summary` where the budget admits the original.

    Raises
    ------
    TersorError
        Its subclasses; FileExistsError if the output exists.
    """
    chosen, began = dataclasses.replace(settings or CompressSettings(), **changes), time.perf_counter()
    chosen = dataclasses.replace(chosen, device=chosen.places[0])
    card.check_name(chosen.base_model)
    effort_of(chosen.method, chosen.effort)
    work = WorkFolder(Path(output)).claim()
    opened = open_source(Path(source), work / "staged", dense=chosen.dense, leave_out=chosen.leave_out)
    request = Request(budget_bytes(opened.elements, rate, size), chosen.method, chosen.seed, chosen.options,
                      chosen.sensitivities, chosen.effort)
    if request.budget >= opened.nbytes:
        copy_dense(opened, work.target)
        work.clear("staged")
        return {"copied": True, "summary": {"bytes": opened.nbytes, "budget": request.budget}}
    try:
        _check(opened, request, chosen, work)
    except TersorError:
        work.clear("staged")
        raise
    work.stamp(_mark(opened, request, chosen), resume=chosen.resume)
    reading = chosen.reading(opened, work / "activations")
    tell = Teller(progress, work, opened.nbytes, lambda: "" if reading is None else reading.place)
    with chosen.crew() as crew:
        report = _stages(opened, request, chosen, crew, work, reading, tell)
    with _verifying(opened, chosen, work):
        report |= _judged(opened, chosen, work, tell)
    report["summary"] |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()}
    write_json(work / "output" / REPORT, report)
    asked = f"--rate {rate:g}" if size is None else f"--size {size}"
    card.write_card(work / "output", report, card.base_of(opened, chosen.base_model),
                    card.command(request, asked, chosen.changed()))
    work.finish("matrices", "staged", "activations", "recover.part", "written")
    return report


def _judged(source: Source, settings: CompressSettings, work: WorkFolder, progress: Progress) -> dict[str, Any]:
    """Return the evaluation of what was written, and samples beside the original's, where they are asked for."""
    found: dict[str, Any] = {}
    output, text, device = work / "output", settings.heldout, settings.device
    if settings.evaluation_tokens:
        found["evaluation"] = evaluate(output, source, text, context=settings.context,
                                       tokens=settings.evaluation_tokens, device=device, progress=progress)
    if settings.evaluation_tokens and settings.samples:
        found["samples"] = samples(output, source, text, settings.samples, device=device, progress=progress)
    return found


def _check(source: Source, request: Request, settings: CompressSettings, work: WorkFolder) -> None:
    """Refuse before any work what would fail after it."""
    shapes = needs.Shapes.of(source, settings.device, whole=settings.whole)
    if settings.engine is not None:
        check_engine(settings.engine)
    needs.check_disk(work.path, needs.disk(shapes, request.budget, settings.sampling, calibrated=settings.calibrated))
    needs.check_memory(shapes, settings.places)
    if settings.calibrated or settings.evaluation_tokens:
        check_text(model_class(source.config))
    if settings.samples:
        check_language_model(source.config, "a sample")
    if settings.recovery is not None:
        recover.check(source, settings.recovery, shapes.block if shapes.blocks else source.elements)
        if not settings.recover_blocks:
            recover.check_codecs(source, first_rungs(request))
    source.tried.check()
    check_options(request)
    check_weights(list(source.layout.matrices), request.sensitivities)
    plan.check_reachable(source, request, _record(source, None, request, settings))
    reading = settings.reading(source, Path())
    if settings.evaluation_tokens:
        read_ids(source, settings.heldout, settings.context, settings.evaluation_tokens)
    check_numbers(source, reading, settings.device)


def _record(source: Source, known: Calibration | None, request: Request,
            settings: CompressSettings) -> dict[str, Any]:
    """Return the provenance, with that of the training where there is to be one."""
    training = settings.recovery
    return provenance(source, known, request, tersor.__version__) | (training.record(source) if training else {})


def _mark(source: Source, request: Request, settings: CompressSettings) -> str:
    """Return a digest of all that the stages' files depend on."""
    seen = text_source(settings.text_seen) if settings.calibrated else None
    training = settings.recovery.record(source) if settings.recovery is not None else None
    facts = [tersor.__version__, source.fingerprint, training, source.companion_digests, source.ledger.summary(),
             dataclasses.asdict(request), seen,
             dataclasses.asdict(settings.sampling)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _stages(source: Source, request: Request, settings: CompressSettings, crew: Crew, work: WorkFolder,
            reading: Reading | None, progress: Progress) -> dict[str, Any]:
    """Run the stages, each from the files of those before it; return the report of a verified output."""
    known, device = None, str(crew.devices[0])
    if reading is not None:
        known = calibrate.sensitivities(reading, work / "sensitivities.json", progress)
        give_back(cycles=True)  # what a stage has freed, the next one would find taken
    choices = survey.run(source, known, request, work / "survey.jsonl", device=device, reading=reading,
                         crew=crew, progress=progress)
    give_back(cycles=True)
    training, record = settings.recovery, _record(source, known, request, settings)
    picks = plan.run(source, choices, request, record)
    write_json(work / "plan.json", to_json(picks))
    job = encode.Job(source, picks, known, request, record)
    course = None if training is None else Course(source, training, work, progress)
    matrices = encode.run(job, work, device=device, reading=reading, crew=crew, progress=progress,
                          course=None if reading is None else course)
    give_back(cycles=True)
    recovered: dict[str, Any] = {}
    if course is not None and course.settings.blocks:
        recovered["recovery"] = recover.told_of_blocks(course.phases)
    elif course is not None:
        recovered["recovery"] = recover.told(recover.improve(source, work, course, progress), course.phases)
        matrices = recover.remeasured(work / "output", source, matrices)
    nbytes = store.stored_nbytes(work / "output")
    if nbytes > request.budget:
        raise TersorError(f"internal: wrote {nbytes} bytes for a budget of {request.budget}")
    return _told(job, matrices, work, {"budget": request.budget, "method": request.method}) | recovered


def _check_companions(source: Source, output: Path) -> None:
    """Raise `ModelError` if a companion was changed between opening the source and copying it."""
    source.check_unchanged()
    odd = [name for name, expected in source.companion_digests.items() if file_digest(output / name) != expected]
    if odd:
        raise ModelError(f"{source.path}: {odd} changed while the model was compressed; run again")


def conclude(job: encode.Job, matrices: Mapping[str, Any], work: WorkFolder,
             asked: Mapping[str, Any], *, devices: Sequence[str] = ("cpu",)) -> dict[str, Any]:
    """Write the report beside what was encoded, and verify both in a new process; return the report.

    Parameters
    ----------
    asked : mapping
        What the user gave besides a plan, for the summary: the budget and the method.
    devices : sequence of str
        Where the output is verified.

    Raises
    ------
    VerificationError
        If the output is not what was encoded.
    """
    report = _told(job, matrices, work, asked)
    verify_in_fresh_process(work / "output", job.source.path, devices)
    return report


def _told(job: encode.Job, matrices: Mapping[str, Any], work: WorkFolder, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Write the report and the model card beside what was encoded; return the former."""
    source, nbytes = job.source, store.stored_nbytes(work / "output")
    summary = {"bytes": nbytes, **asked, "rate": 8 * nbytes / source.elements, "parameters": source.elements,
               "bytes_original": source.original_nbytes}
    summary["package_bytes"] = package_nbytes(job.picks.values())
    report = {"summary": summary, "matrices": matrices, "ledger": source.ledger.report(),
              "left_dense": source.left_dense,
              "provenance": job.provenance}
    _check_companions(source, work / "output")
    write_json(work / "output" / REPORT, report)
    card.write_card(work / "output", report, card.base_of(source))
    return report


@contextlib.contextmanager
def _verifying(source: Source, settings: CompressSettings, work: WorkFolder) -> Iterator[None]:
    """Verify the output in a new process: before what is done within, or meanwhile, where there is room for both.

    What loads a new process, and much of a verification, takes one thread of a processor only, and leaves a GPU idle.

    Raises
    ------
    VerificationError
        If the output is not what was encoded; also in the place of an error within.
    """
    given = work / "output", source.path, list(settings.places)
    shapes = needs.Shapes.of(source, settings.device, whole=settings.whole)
    if not needs.room_beside(shapes, settings.device, settings.evaluation_tokens, settings.context):
        verify_in_fresh_process(*given)
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tersor-verify") as pool:
        verified = pool.submit(verify_in_fresh_process, *given)
        try:
            yield
        except TersorError:
            verified.result()
            raise
        verified.result()
