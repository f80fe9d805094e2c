"""`compress_model`: the whole way from a model directory to a verified, evaluated, compressed one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tersor
from tersor import store
from tersor.errors import TersorError
from tersor.families import DEFAULT
from tersor.files import write_json
from tersor.hf.compress import encode
from tersor.hf.compress import survey as surveying
from tersor.hf.compress.calibrate import calibrate
from tersor.hf.compress.encode import Job
from tersor.hf.compress.method import check_options
from tersor.hf.compress.plan import check_reachable, make_plan
from tersor.hf.compress.request import Progress, Request, Sampling, budget_bytes, check_device, no_progress, provenance
from tersor.hf.compress.verify import verify_in_fresh_process
from tersor.hf.compress.work import REPORT, WORK_NAMES, claim, peak_memory, work_folder
from tersor.hf.models.evaluate import evaluate
from tersor.hf.models.source import Source, open_source, read_matrix
from tersor.hf.models.text import (
    check_context,
    default_calibration,
    default_heldout,
    read_text,
    read_tokenizer,
    text_source,
    token_ids,
)
from tersor.planning import plan as planning
from tersor.planning.calibration import Calibration


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything `compress_model` may be told besides source, output and budget.

    Attributes
    ----------
    method : str
        A family, or one codec string for every matrix.
    calibration : Path or None
        Text; None uses the packaged one.
    calibrated : bool
        False: no calibration at all; plain errors, no error feedback.
    text : Path or None
        Held-out text to evaluate on; None uses the packaged one.
    sampling : Sampling
        How much text to calibrate on.
    evaluation_tokens : int
        Tokens to evaluate on; 0 skips the evaluation.
    context : int
        Window length of the evaluation, in tokens.
    """

    method: str = DEFAULT
    calibration: Path | None = None
    calibrated: bool = True
    text: Path | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    evaluation_tokens: int = 8192
    context: int = 512
    seed: int = 0
    device: str = "cpu"
    resume: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sensitivities: Mapping[str, float] = dataclasses.field(default_factory=dict)


def compress_model(source: str | Path, output: str | Path, rate: float | None = None, *, size: int | None = None,
                   settings: Settings | None = None, progress: Progress = no_progress,
                   **changes: Any) -> dict[str, Any]:
    """Compress a transformers causal language model to a byte budget, verify it, and evaluate it.

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
    settings : Settings or None
        Everything else; `**changes` replace its fields (`method="uniform"`, `seed=1`, …).

    Returns
    -------
    dict
        The report: `summary`, `matrices` by name, `evaluation`, `provenance`; or `copied` and `summary` where the
        budget admits the original.

    Raises
    ------
    TersorError
        Its subclasses; FileExistsError if the output exists.
    """
    chosen = dataclasses.replace(settings or Settings(), **changes)
    target = Path(output).resolve()
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another output")
    work = claim(work_folder(target))
    began = time.perf_counter()
    opened = open_source(Path(source), work / "staged")
    request = Request(budget_bytes(opened, rate, size), chosen.method, chosen.seed, chosen.options,
                      chosen.sensitivities)
    if request.budget >= opened.nbytes:
        encode.copy_dense(opened, target)
        return {"copied": True, "summary": {"bytes": opened.nbytes, "budget": request.budget}}
    _check(opened, request, chosen)
    _prepare(work, opened, request, chosen)
    report = _stages(opened, request, chosen, work, progress)
    finished = work / "output"
    _write_report(finished, report)
    verify_in_fresh_process(finished, opened.folder)
    if chosen.evaluation_tokens:
        report["evaluation"] = evaluate(finished, opened, chosen.text or default_heldout(), context=chosen.context,
                                        tokens=chosen.evaluation_tokens, device=chosen.device, progress=progress)
    report["summary"]["seconds"] = time.perf_counter() - began
    report["summary"]["peak_memory_bytes"] = peak_memory()
    _write_report(finished, report)
    finished.rename(target)
    shutil.rmtree(work / "matrices", ignore_errors=True)
    shutil.rmtree(work / "staged", ignore_errors=True)
    return report


def _check(source: Source, request: Request, settings: Settings) -> None:
    """Refuse before any work what would fail after it."""
    check_device(settings.device)
    check_options(request)
    planning.check_weights(list(source.layout.matrices), request.sensitivities)
    check_reachable(source, None, request, tersor.__version__)
    tokenizer = read_tokenizer(source.folder) if settings.calibrated or settings.evaluation_tokens else None
    wanted = [(settings.calibration or default_calibration(), settings.sampling.context, settings.sampling.tokens)]
    wanted = wanted if settings.calibrated else []
    if settings.evaluation_tokens:
        wanted.append((settings.text or default_heldout(), settings.context, settings.evaluation_tokens))
    for path, context, tokens in wanted:
        assert tokenizer is not None
        check_context(source.config, context)
        token_ids(tokenizer, read_text(path), context, tokens, str(path))
    for matrix in source.layout.matrices.values():
        read_matrix(source, matrix, "cpu")  # NaN and infinity are found, and named, before anything runs


def _prepare(work: Path, source: Source, request: Request, settings: Settings) -> None:
    """Make the work folder; empty it unless it was left by a run with the same fingerprint."""
    mark = work / "fingerprint"
    text = settings.calibration or default_calibration()
    seen = text_source(text) if settings.calibrated else None
    facts = [tersor.__version__, source.fingerprint(), dataclasses.asdict(request), seen,
             dataclasses.asdict(settings.sampling)]
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    same = settings.resume and mark.is_file() and mark.read_text() == fingerprint
    work.mkdir(parents=True, exist_ok=True)
    for child in list(work.iterdir()):  # `claim` has made sure that these are ours
        if child.name != "staged" and not (same and child.name in WORK_NAMES):
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    mark.write_text(fingerprint)
    shutil.rmtree(work / "output", ignore_errors=True)


def _stages(source: Source, request: Request, settings: Settings, work: Path, progress: Progress) -> dict[str, Any]:
    calibration = None
    if settings.calibrated:
        file = work / "calibration.safetensors"
        if not file.exists():
            calibrate(source, settings.calibration or default_calibration(), file, settings.sampling,
                               device=settings.device, progress=progress)
        calibration = Calibration.load(file)
    choices = surveying.survey(source, calibration, request, work / "survey.jsonl", device=settings.device,
                              progress=progress)
    record = provenance(source, calibration, request, tersor.__version__)
    picks = make_plan(source, choices, request, record)
    write_json(work / "plan.json", planning.to_json(picks))
    matrices = encode.encode(Job(source, picks, calibration, request, record), work, work / "output",
                               device=settings.device, progress=progress)
    nbytes = store.stored_nbytes(work / "output")
    if nbytes > request.budget:
        raise TersorError(f"internal: wrote {nbytes} bytes for a budget of {request.budget}")
    summary = {"bytes": nbytes, "budget": request.budget, "rate": 8 * nbytes / source.elements,
               "parameters": source.elements, "bytes_original": source.original_nbytes, "method": request.method}
    return {"summary": summary, "matrices": matrices, "provenance": record}


def finish(source: Source, matrices: Mapping[str, Any], record: Mapping[str, Any], work: Path,
           target: Path) -> dict[str, Any]:
    """Verify what `pipeline.encode` left in the work folder and put it in place; return a flat summary."""
    nbytes = store.stored_nbytes(work / "output")
    summary = {"bytes": nbytes, "rate": 8 * nbytes / source.elements, "parameters": source.elements,
               "bytes_original": source.original_nbytes}
    _write_report(work / "output", {"summary": summary, "matrices": matrices, "provenance": record})
    verify_in_fresh_process(work / "output", source.folder)
    (work / "output").rename(target)
    shutil.rmtree(work / "matrices", ignore_errors=True)
    return summary


def _write_report(folder: Path, report: Mapping[str, Any]) -> None:
    write_json(folder / REPORT, report)
