"""`write_gguf`: from a model to a GGUF file of a given size, verified and evaluated.

The stages in order: calibrate, survey, plan, encode, verify, evaluate; each keeps its files in a work folder beside the
output, and a killed run goes on from them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tersor
from tersor.errors import CodecConfigError, ModelError, TersorError
from tersor.files import exclusive, file_digest, seal, write_json
from tersor.gguf import plan
from tersor.gguf.quantizable import quantizable
from tersor.gguf.types.base import BlockType
from tersor.gguf.types.ladder import BY_NUMBER, rungs, type_of
from tersor.hf.compress.request import Progress, Sampling, Texts, budget_bytes, no_progress
from tersor.hf.compress.sides import TOKENS
from tersor.hf.compress.work import WorkFolder, peak_memory
from tersor.hf.gguf import encoding, survey
from tersor.hf.gguf.evaluation import evaluate
from tersor.hf.gguf.from_file import open_file
from tersor.hf.gguf.from_folder import open_folder
from tersor.hf.gguf.inputs import Known, calibrated
from tersor.hf.gguf.origin import Item, Origin
from tersor.hf.gguf.verify import verify
from tersor.hf.models.classes import check_text, model_class
from tersor.hf.models.text import read_ids, text_source
from tersor.planning.calibration import Calibration

ROUNDS = {"fast": 0, "normal": 2, "best": 6}
SWEEPS = {"fast": 0, "normal": 2, "best": 4}
OUTPUT = "output"
LARGE, SMALL = 256, 32  # weights of the blocks of most types, and of the others


@dataclasses.dataclass(frozen=True)
class GgufSettings(Texts):
    """Everything `write_gguf` may be told besides source, output and budget.

    Attributes
    ----------
    effort : str
        `"fast"`, `"normal"` or `"best"`: how often levels and scales are chosen again.
    moments : Path or None
        A file that `tersor calibrate` wrote of the same model, instead of reading the text: for several sizes.
    requantize : bool
        Take a GGUF file whose tensors are quantized already.
    dense : tuple of str
        Shell patterns of tensors, as llama.cpp names them, that stay as they are.
    types : tuple of str
        The types that tensors may have besides their own; none: all.
    """

    effort: str = "normal"
    moments: Path | None = None
    requantize: bool = False
    dense: tuple[str, ...] = ()
    types: tuple[str, ...] = ()


@exclusive("output")
def write_gguf(source: str | Path, output: str | Path, rate: float | None = None, *, size: int | None = None,
               settings: GgufSettings | None = None, progress: Progress = no_progress,
               **changes: Any) -> dict[str, Any]:
    """Write a model as a GGUF file within a byte budget, verify it, and evaluate it.

    Parameters
    ----------
    source : path
        A .gguf file of plain numbers, or a transformers directory.
    output : path
        A new .gguf file; appears only when verified. `OUT.work` beside it keeps calibration, survey and plan.
    rate : float or None
        Bits a weight over **all** weights, the whole file counted.
    size : int or None
        Bytes of the file, instead of a rate.
    settings : GgufSettings or None
        Everything else; `**changes` replace its fields.

    Returns
    -------
    dict
        The report: `summary`, `tensors` by name, `widths` that most types do not take, `evaluation`, `provenance`.

    Raises
    ------
    TersorError
        Its subclasses; FileExistsError if the output exists.
    """
    chosen, began = dataclasses.replace(settings or GgufSettings(), **changes), time.perf_counter()
    if chosen.effort not in ROUNDS:
        raise CodecConfigError(f"effort: expected one of {', '.join(ROUNDS)}, found {chosen.effort!r}")
    for name in chosen.types:
        type_of(name)
    target = Path(output)
    if target.suffix != ".gguf":
        raise CodecConfigError(f"OUT: expected the name of a new .gguf file, found '{target}'")
    work = WorkFolder(target).claim()
    origin = _open(Path(source), work / "staged", chosen)
    budget = budget_bytes(origin.elements, rate, size)
    try:
        items = _encodable(origin, chosen)
        _check(origin, items, budget, chosen)
    except TersorError:
        work.clear("staged")
        raise
    mark = _mark(origin, chosen)
    work.stamp(seal([mark, budget, sorted(chosen.types)]), resume=chosen.resume)
    report = _stages((origin, items), budget, chosen, work, progress)
    report["summary"] |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()}
    write_json(target.with_name(f"{target.name}.report.json"), report)
    work.finish("matrices", "staged")
    return report


def _open(path: Path, staged: Path, settings: GgufSettings) -> Origin:
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory")
    if path.is_dir():
        return open_folder(path, staged)
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: expected a .gguf file or a transformers directory")
    modelled = settings.calibrated or settings.evaluation_tokens > 0
    try:
        return open_file(path, staged, modelled=modelled, requantize=settings.requantize)
    except ModelError as error:
        if modelled and "transformers" in str(error):
            raise ModelError(f"{error}; --uncalibrated with --evaluation-tokens 0 encodes it without transformers, at "
                             "larger errors") from error
        raise


def _encodable(origin: Origin, settings: GgufSettings) -> list[Item]:
    """Return the tensors that may be quantized, and whose width some type takes."""
    names = [item.entry.name for item in origin.items]
    for pattern in settings.dense:
        if not fnmatch.filter(names, pattern):
            raise ModelError(f"--dense '{pattern}' matches none of the tensors, such as {names[:3]}")
    return [item for item in origin.items if quantizable(item.entry) and rungs(item.entry.shape[-1], settings.types)
            and not any(fnmatch.fnmatchcase(item.entry.name, pattern) for pattern in settings.dense)]


def _check(origin: Origin, items: Sequence[Item], budget: int, settings: GgufSettings) -> None:
    """Refuse before any work what would fail after it."""
    if not items:
        raise _nothing(origin, settings)
    least = _least(origin, items, settings.types)
    plan.spend_file(origin.pairs, [item.entry for item in origin.items], least, budget)
    if settings.calibrated or settings.evaluation_tokens:
        check_text(model_class(origin.known().config))
    if settings.moments is not None:
        _read_moments(settings, items)
    elif settings.calibrated:
        read_ids(origin.known(), settings.text_seen, settings.sampling.context, settings.sampling.tokens)
    if settings.evaluation_tokens:
        read_ids(origin.known(), settings.heldout, settings.context, settings.evaluation_tokens)


def _nothing(origin: Origin, settings: GgufSettings) -> ModelError:
    """Return the error for a model of which all would stay as it is."""
    widths = sorted({item.entry.shape[-1] for item in origin.items if quantizable(item.entry)})
    what = f"the types {', '.join(settings.types)}" if settings.types else f"any type, the least of which has {SMALL}"
    return ModelError(f"{origin.path}: no tensor of it can be quantized: its matrices have rows of "
                      f"{', '.join(map(str, widths[:4]))} weights, which are no whole blocks of {what}"
                      f"{', or stay dense as asked' if settings.dense else ''}")


def _read_moments(settings: GgufSettings, items: Sequence[Item]) -> Calibration:
    """Return the calibration in the user's file.

    Raises
    ------
    CodecConfigError
        If it is of another model, or calibration is not wanted.
    """
    assert settings.moments is not None
    if not settings.calibrated:
        raise CodecConfigError(f"{settings.moments}: a calibration, but none is wanted; leave out one of both")
    found = Calibration.load(settings.moments)
    if not any(item.matrix in found.hessians for item in items):
        raise CodecConfigError(f"{settings.moments}: names no matrix of this model, but {sorted(found.hessians)[:3]}; "
                               "calibrate this model")
    return found


def _least(origin: Origin, items: Sequence[Item], allowed: Sequence[str]) -> dict[str, list[plan.Choice[BlockType]]]:
    """Return the least choice of every tensor."""
    chosen = {item.entry.name for item in items}
    found: dict[str, list[plan.Choice[BlockType]]] = {}
    for item in origin.items:
        kinds: list[BlockType] = [BY_NUMBER[item.entry.number]]
        if item.entry.name in chosen:
            kinds += rungs(item.entry.shape[-1], allowed)
        least = min(kinds, key=lambda kind: kind.rate)
        found[item.entry.name] = [plan.Choice(least, least.tensor_nbytes(item.entry.elements), 0.0)]
    return found


def _mark(origin: Origin, settings: GgufSettings) -> list[Any]:
    """Return what the bytes of a tensor depend on, besides its type."""
    seen: Any = None
    if settings.moments is not None:
        seen = Calibration.load(settings.moments).sha256
    elif settings.calibrated:
        seen = [text_source(settings.text_seen), dataclasses.asdict(settings.sampling)]
    return [tersor.__version__, origin.fingerprint, seen, settings.effort, list(settings.dense)]


def _sampling(settings: GgufSettings) -> Sampling:
    """Return how much text is read: enough for how errors of rows add up, where the effort asks for it."""
    found = settings.sampling
    if not (SWEEPS[settings.effort] and found.fisher_tokens):
        return found
    return dataclasses.replace(found, fisher_tokens=max(found.fisher_tokens, min(found.tokens, TOKENS)),
                               fisher_context=found.context)


def _stages(model: tuple[Origin, Sequence[Item]], budget: int, settings: GgufSettings, work: WorkFolder,
            progress: Progress) -> dict[str, Any]:
    origin, items = model
    calibration: Calibration | None = None
    if settings.moments is not None:
        calibration = _read_moments(settings, items)
    elif settings.calibrated:
        calibration = calibrated(origin.known(), settings.text_seen, work / "calibration.safetensors",
                                 _sampling(settings), progress)
    mark = [*_mark(origin, settings), None if calibration is None else calibration.sha256]
    known = Known(calibration, items, origin.source)
    choices = survey.run(origin, items, known, work / "survey.jsonl", rate=8 * budget / origin.elements,
                         allowed=settings.types, mark=mark, progress=progress)
    entries = [item.entry for item in origin.items]
    types = plan.spend_file(origin.pairs, entries, choices, budget)
    write_json(work / "plan.json", {name: kind.name for name, kind in types.items()})
    job = encoding.Job(origin, types, known, ROUNDS[settings.effort], SWEEPS[settings.effort], mark)
    lines = encoding.run(job, work / "matrices", work / OUTPUT, progress)
    nbytes = (work / OUTPUT).stat().st_size
    if nbytes > budget or nbytes != plan.file_nbytes(origin.pairs, entries, types):
        raise TersorError(f"internal: wrote {nbytes} bytes for a budget of {budget}")
    checked = verify(work / OUTPUT, origin, lines, progress)
    report: dict[str, Any] = {"summary": _summary(origin, lines, nbytes, budget) | checked, "tensors": lines,
                              "widths": _widths(origin, settings)}
    if settings.evaluation_tokens:
        report["evaluation"] = evaluate(work / OUTPUT, origin, settings.heldout, context=settings.context,
                                        tokens=settings.evaluation_tokens, progress=progress)
    seen = None if calibration is None else {"tokens": calibration.tokens, "source": calibration.source}
    report["sha256"] = file_digest(work / OUTPUT)
    report["provenance"] = {"tersor": tersor.__version__, "source_sha256": origin.fingerprint, "calibration": seen,
                            "effort": settings.effort, "dense": list(settings.dense)}
    return report


def _widths(origin: Origin, settings: GgufSettings) -> dict[str, dict[str, Any]]:
    """Return the widths of matrices that are no multiple of a large block: how many matrices, and what they can be."""
    found: dict[str, dict[str, Any]] = {}
    for item in origin.items:
        width = item.entry.shape[-1]
        if quantizable(item.entry) and width % LARGE:
            line = found.setdefault(str(width), {"tensors": 0, "such_as": item.entry.name})
            line["tensors"] += 1
            line["types"] = [kind.name for kind in rungs(width, settings.types)]
    return found


def _summary(origin: Origin, lines: Mapping[str, Mapping[str, Any]], nbytes: int, budget: int) -> dict[str, Any]:
    counted = Counter[str]()
    for line in lines.values():
        if len(line["shape"]) > 1:
            counted[line["type"]] += 1
    return {"bytes": nbytes, "budget": budget, "rate": 8 * nbytes / origin.elements, "parameters": origin.elements,
            "bytes_original": origin.nbytes, "bytes_tensors": sum(line["nbytes"] for line in lines.values()),
            "types": dict(sorted(counted.items()))}
