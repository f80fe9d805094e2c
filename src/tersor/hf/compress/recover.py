"""Recovery of what was compressed: a store's continuous parts are trained against its source, and written anew.

As a stage of `compress_model`, between encoding and verification; and as `recover_model`, for a model that is there.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor
from tersor import store
from tersor.errors import ModelError, RecoveryWarning, TersorError, VerificationError
from tersor.files import exclusive, read_json, seal, write_json
from tersor.hf.compress import card
from tersor.hf.compress.checkpoint import Checkpoint
from tersor.hf.compress.desk import measured
from tersor.hf.compress.request import Progress, no_progress, usable_device
from tersor.hf.compress.status import Teller
from tersor.hf.compress.verify import verify_in_fresh_process
from tersor.hf.compress.work import WorkFolder, peak_memory
from tersor.hf.models.classes import check_language_model
from tersor.hf.models.evaluate import Original, evaluate
from tersor.hf.models.source import Source, made_from, open_source
from tersor.hf.models.staging import REPORT
from tersor.hf.models.text import default_calibration, default_heldout, read_ids, text_source, windows
from tersor.hf.recover.student import Student, vectors_of
from tersor.hf.recover.training import Lesson, Outcome, Training, halves
from tersor.numerics.memory import check_memory

RECORD = "recovery"  # in a manifest's provenance
AT_ONCE = 2048  # tokens run at a time
STEP = 4096  # tokens of a step
APART = 16  # one window in so many is kept apart
LEAST = 8  # windows, of which one or more are kept apart
BYTES = 20  # a parameter: the original, weights, weights without scales, gradients of two batches


@dataclasses.dataclass(frozen=True)
class RecoverSettings:
    """How a compressed model is trained.

    Attributes
    ----------
    text : Path or None
        Calibration text; None uses the packaged one.
    tokens : int
        Of the text, at most.
    passes : float
        Times that the text is read.
    context : int
        Tokens of a window.
    heldout : Path or None
        Text to evaluate on; None uses the packaged one.
    evaluation_tokens : int
        Tokens of it; 0 skips the evaluation.
    """

    text: Path | None = None
    tokens: int = 262144
    passes: float = 2.0
    context: int = 512
    seed: int = 0
    device: str = "cpu"
    resume: bool = True
    heldout: Path | None = None
    evaluation_tokens: int = 8192

    @property
    def read(self) -> Path:
        """The calibration text."""
        return self.text or default_calibration()

    def record(self, source: Source) -> dict[str, Any]:
        """Return what a manifest says of the recovery; its length does not depend on what comes of it."""
        return {RECORD: {"source": text_source(self.read), "tokens": self.tokens, "passes": self.passes,
                         "seed": self.seed, "vectors": vectors_of(source)}}

    def lesson(self, source: Source) -> Lesson:
        """Return the text in batches.

        Raises
        ------
        ModelError
            If there is too little text, or passes are not positive.
        """
        if not 0 < self.passes <= 1000:
            raise ModelError(f"passes of the text must lie above 0 and up to 1000, found {self.passes}")
        every = windows(read_ids(source, self.read, self.context, self.tokens), self.context)
        if len(every) < LEAST:
            raise ModelError(f"{self.read}: {every.numel()} tokens make {len(every)} windows of {self.context}; "
                             f"recovery needs at least {LEAST}; give a longer text, more --tokens or a shorter "
                             "--context")
        kept = torch.arange(len(every)) % APART == LEAST - 1
        size = max(1, AT_ONCE // self.context)
        apart, rest = every[kept].split(size), every[~kept].split(size)
        each = max(1, STEP // max(AT_ONCE, self.context))
        steps = max(1, round(self.passes * len(rest) / each))
        return Lesson([*apart, *rest], len(apart), each, steps, self.seed)


def check(source: Source, settings: RecoverSettings) -> None:
    """Refuse before any work what would fail after it."""
    check_language_model(source.config, "recovery")
    settings.lesson(source)
    if settings.device == "cpu":
        check_memory(BYTES * source.elements, "recovery, which holds a model and its gradients,",
                     "give a machine with more, or compress without --recover")


def improve(source: Source, work: WorkFolder, settings: RecoverSettings, tell: Progress,
            folder: Path | None = None) -> Outcome:
    """Train the parts of a store; the store `output` in the work folder is the trained one afterwards.

    Parameters
    ----------
    folder : Path or None
        The store; None: that `output`, which it replaces.
    """
    given, lesson = folder or work / "output", settings.lesson(source)
    opened = store.read(given)
    student = Student(opened, source, settings.device)
    mark = seal([tersor.__version__, opened.manifest["sha256"], source.fingerprint, settings.record(source),
                 settings.context, student.device.type, halves(student.device)])
    tell("teacher", 0, 1)
    teacher = Original(source, lesson.batches, settings.device, lambda done, total: tell("teacher", done, total),
                       work / "activations" / "teacher")
    tell("recover", 0, lesson.steps)
    saved = Checkpoint(work / "recover.part", mark)
    outcome = Training(student, teacher, lesson, saved, lambda done: tell("recover", done, lesson.steps)).run()
    tell("recover", lesson.steps, lesson.steps)
    _warn(outcome)
    shutil.rmtree(work / "recovered", ignore_errors=True)
    _write(opened, student.stored(outcome.values), work / "recovered", settings.record(source))
    shutil.rmtree(work / "output", ignore_errors=True)
    (work / "recovered").rename(work / "output")
    return outcome


def _warn(outcome: Outcome) -> None:
    """Say what did not go as it should."""
    if outcome.diverged:
        warnings.warn(f"recovery diverged after {outcome.taken} steps (KL {outcome.history[-1][1]:.4g}, from "
                      f"{outcome.before:.4g}); the best state, of step {outcome.steps}, is kept", RecoveryWarning,
                      stacklevel=3)
    elif not outcome.steps:
        warnings.warn(f"recovery found nothing better than what there was (KL {outcome.before:.4g} on text kept "
                      "apart); nothing is changed", RecoveryWarning, stacklevel=3)


def _write(opened: store.Store, parts: Mapping[str, Tensor], path: Path, record: Mapping[str, Any]) -> None:
    """Write a store with parts in the place of those that it had."""
    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        held = {"": opened.plain(entry.name)} if entry.codec is None else opened.matrix(entry.name).tensors
        return {key: parts[entry.key(key)].cpu().reshape(tensor.shape) if entry.key(key) in parts else tensor
                for key, tensor in held.items()}

    files = {name: opened.path / name for name in opened.manifest["files"]}
    store.write(path, list(opened.entries.values()), payload, kind=opened.kind,
                provenance={**opened.manifest["provenance"], **record}, files=files)


def remeasured(path: Path, source: Source, lines: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report's lines of matrices with the errors that they have now; all inputs count alike."""
    opened, found = store.read(path), dict[str, Any]()
    for name in opened.matrix_names():
        encoded = opened.matrix(name)
        old, dense = lines.get(name, {}), source.matrix(source.layout.matrices[name])
        found[name] = {**old, **measured(dense, encoded, None, old.get("options", {}))}
    return found


def told(outcome: Outcome) -> dict[str, Any]:
    """Return what a report says of a recovery."""
    return {"kl_before": outcome.before, "kl_after": outcome.after, "steps": outcome.steps, "taken": outcome.taken,
            "diverged": outcome.diverged, "history": [list(line) for line in outcome.history]}


@exclusive("output")
def recover_model(compressed: str | Path, output: str | Path, against: str | Path, *,
                  settings: RecoverSettings | None = None, progress: Progress = no_progress,
                  **changes: Any) -> dict[str, Any]:
    """Train what is continuous in a compressed model against the model that it was made from.

    Codes stay, and so do the bytes of every tensor; what is trained are row scales, norms and biases.

    Parameters
    ----------
    compressed : path
        What `compress_model` wrote; it is only read.
    output : path
        New directory; appears only when verified. `OUT.work` beside it keeps what a killed run goes on from.
    against : path
        The original: a transformers directory, or a .gguf file.
    settings : RecoverSettings or None
        Everything else; `**changes` replace its fields.

    Returns
    -------
    dict
        The report: `summary`, `matrices`, `recovery`, `evaluation`, `provenance`.

    Raises
    ------
    VerificationError
        If the store was made from another model.
    TersorError
        Its other subclasses; FileExistsError if the output exists.
    """
    chosen, began = dataclasses.replace(settings or RecoverSettings(), **changes), time.perf_counter()
    chosen = dataclasses.replace(chosen, device=usable_device(chosen.device))
    path, work = Path(compressed), WorkFolder(Path(output)).claim()
    opened = store.read(path)
    if opened.kind != "model":
        raise ModelError(f"{path}: holds a {opened.kind}, no model; recovery needs a compressed model")
    source = open_source(Path(against), work / "staged")
    try:
        if not made_from(opened.manifest["provenance"], source):
            raise VerificationError(f"{path} was not made from {source.path}: its manifest names a source of other "
                                    "bytes; give the model that it was made from")
        check(source, chosen)
        if chosen.evaluation_tokens:
            read_ids(source, chosen.heldout or default_heldout(), chosen.context, chosen.evaluation_tokens)
    except TersorError:
        work.clear("staged")
        raise
    work.stamp(seal([opened.manifest["sha256"], source.fingerprint, chosen.record(source)]), resume=chosen.resume)
    tell = Teller(progress, work, source.nbytes, lambda: "")
    outcome = improve(source, work, chosen, tell, path)
    report = _reported(path, source, work, chosen, outcome, tell)
    report["summary"]["seconds"], report["summary"]["peak_memory_bytes"] = time.perf_counter() - began, peak_memory()
    write_json(work / "output" / REPORT, report)
    verify_in_fresh_process(work / "output", source.path, [chosen.device])
    work.finish()
    return report


def _reported(path: Path, source: Source, work: WorkFolder, settings: RecoverSettings, outcome: Outcome,
              tell: Progress) -> dict[str, Any]:
    """Return the report of a recovered model, evaluated where that is asked for; write its card."""
    output = work / "output"
    before = read_json(path / REPORT) if (path / REPORT).is_file() else {}
    nbytes, opened = store.stored_nbytes(output), store.read(output)
    summary = {"method": before.get("summary", {}).get("method"), "bytes": nbytes,
               "rate": 8 * nbytes / source.elements, "parameters": source.elements,
               "bytes_original": source.original_nbytes, "bytes_before": store.stored_nbytes(path)}
    report = {"summary": summary, "matrices": remeasured(output, source, before.get("matrices", {})),
              "ledger": before.get("ledger", source.ledger.report()), "left_dense": before.get("left_dense", {}),
              "provenance": opened.manifest["provenance"], "recovery": told(outcome)}
    if settings.evaluation_tokens:
        report["evaluation"] = evaluate(output, source, settings.heldout or default_heldout(),
                                        context=settings.context, tokens=settings.evaluation_tokens,
                                        device=settings.device, progress=tell)
    card.write_card(output, report, card.base_of(source), "tersor recover OUT RECOVERED --against MODEL")
    return report
