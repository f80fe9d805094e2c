"""Recovery of what was compressed: a store's continuous parts are trained against its source, and written anew.

As a stage of `compress_model`, between encoding and verification; and as `recover_model`, for a model that is there.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor import store
from tersor.contract.codec import Codec
from tersor.errors import ModelError, RecoveryWarning, TersorError, VerificationError
from tersor.files import exclusive, read_json, seal, write_json
from tersor.hf.compress import card
from tersor.hf.compress.checkpoint import Checkpoint
from tersor.hf.compress.course import Course, Phase, RecoverSettings
from tersor.hf.compress.desk import measured
from tersor.hf.compress.request import Progress, no_progress, usable_device
from tersor.hf.compress.status import Teller
from tersor.hf.compress.verify import verify_in_fresh_process
from tersor.hf.compress.work import WorkFolder, peak_memory
from tersor.hf.models.classes import check_language_model
from tersor.hf.models.evaluate import evaluate
from tersor.hf.models.source import Source, made_from, open_source, read_matrix
from tersor.hf.models.staging import REPORT
from tersor.hf.models.text import default_heldout, read_ids
from tersor.hf.recover.student import Student, untrainable
from tersor.hf.recover.training import Outcome, Training
from tersor.numerics.memory import check_memory

TRIED = 64  # rows of a matrix that are encoded to see whether a codec has scales
FLAGS = {"text": "--calibration-text", "tokens": "--tokens", "passes": "--passes", "context": "--context",
         "seed": "--seed", "device": "--device", "heldout": "--text", "evaluation_tokens": "--evaluation-tokens",
         "own": "--own"}


def check(source: Source, settings: RecoverSettings, block: int) -> None:
    """Refuse before any work what would fail after it.

    Parameters
    ----------
    block : int
        Elements of the largest block.
    """
    check_language_model(source.config, "recovery")
    if settings.blocks and not settings.moves:
        raise ModelError("a recovery by blocks makes up for what is encoded already, by calibration text; leave out "
                         "--uncalibrated, or --recover-blocks")
    settings.texts(source)
    if settings.device == "cpu":
        check_memory(settings.memory(block if settings.blocks else source.elements),
                     "recovery, which holds a model and its gradients,",
                     "add --recover-blocks, give a machine with more, or compress without --recover")


def check_codecs(source: Source, codecs: Sequence[Codec]) -> None:
    """Refuse codecs none of which has row scales, by encoding some rows of the smallest matrix.

    Raises
    ------
    CodecConfigError
        Lists codecs that have some.
    """
    smallest = min(source.layout.matrices.values(), key=lambda matrix: matrix.shape[0] * matrix.shape[1])
    rows = read_matrix(source, smallest, "cpu")[:TRIED].to(torch.float32)
    for codec in codecs:
        encoded = codec.encode(rows, seed=0, tables=codec.train([rows], seed=0))
        if codec.row_scales(encoded):
            return
    raise untrainable(str(source.path), [codec.spec() for codec in codecs])


def improve(source: Source, work: WorkFolder, course: Course, tell: Progress, folder: Path | None = None) -> Outcome:
    """Train the parts of a store; the store `output` in the work folder is the trained one afterwards.

    Parameters
    ----------
    folder : Path or None
        The store; None: that `output`, which it replaces.
    """
    given, lesson, settings = folder or work / "output", course.lesson, course.settings
    opened = store.read(given)
    student = Student(opened, source, settings.device)
    course.teacher(0)
    tell("recover", 0, lesson.steps)
    saved = Checkpoint(work / "recover.part", seal([opened.manifest["sha256"], course.mark]))
    outcome = Training(student, course.teacher, lesson, saved, lambda done: tell("recover", done, lesson.steps)).run()
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


def told(outcome: Outcome, phases: Sequence[Phase] = ()) -> dict[str, Any]:
    """Return what a report says of a recovery, and of the trainings between encodings."""
    moves = {"moves": [dataclasses.asdict(phase) for phase in phases]} if phases else {}
    return {**moves, "kl_before": outcome.before, "kl_after": outcome.after, "steps": outcome.steps,
            "taken": outcome.taken, "diverged": outcome.diverged, "history": [list(line) for line in outcome.history]}


def told_of_blocks(phases: Sequence[Phase]) -> dict[str, Any]:
    """Return what a report says of a recovery by blocks: relative squared distances of what blocks return."""
    return {"moves": [dataclasses.asdict(phase) for phase in phases], "blocks": True}


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
        check(source, chosen, source.elements)
        if chosen.evaluation_tokens:
            read_ids(source, chosen.heldout or default_heldout(), chosen.context, chosen.evaluation_tokens)
    except TersorError:
        work.clear("staged")
        raise
    work.stamp(seal([opened.manifest["sha256"], source.fingerprint, chosen.record(source)]), resume=chosen.resume)
    tell = Teller(progress, work, source.nbytes, lambda: "")
    outcome = improve(source, work, Course(source, chosen, work, tell), tell, path)
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
    card.write_card(output, report, card.base_of(source), command(settings))
    return report


def command(settings: RecoverSettings) -> str:
    """Return the command line of a recovery: of files, only names are told."""
    changed = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)
               if getattr(settings, field.name) != field.default}
    return shlex.join(["tersor", "recover", "OUT", "RECOVERED", "--against", "MODEL", *card.words(changed, FLAGS)])
