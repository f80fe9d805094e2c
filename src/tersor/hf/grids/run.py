"""`write_packed`: from a model to a directory in the format of compressed-tensors, within a budget.

The stages in order: calibrate, survey, plan, encode, verify, evaluate. Each reads files and writes files, in a work
folder beside the output, and reads the model once, a block at a time.
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
from tersor.errors import CodecConfigError, TersorError
from tersor.files import exclusive, seal, write_json
from tersor.grids.scheme import Scheme, ladder
from tersor.grids.solve import Effort
from tersor.hf.compress import calibrate, encode
from tersor.hf.compress.desk import Wanted
from tersor.hf.compress.reading import Reading, check_numbers
from tersor.hf.compress.request import Progress, Texts, budget_bytes, no_progress, usable_device
from tersor.hf.compress.sides import Sides
from tersor.hf.compress.status import Teller
from tersor.hf.compress.work import WorkFolder, peak_memory
from tersor.hf.grids import output as directory
from tersor.hf.grids import plan, sides, survey
from tersor.hf.grids.desk import GridDesk, Job
from tersor.hf.grids.encodable import fused, open_for_grids
from tersor.hf.grids.verify import verify
from tersor.hf.models.classes import check_text, model_class
from tersor.hf.models.evaluate import evaluate_dense
from tersor.hf.models.source import Source, open_source, read_matrix
from tersor.hf.models.staging import REPORT
from tersor.hf.models.text import read_ids, text_source
from tersor.payload.layout import TensorSpec
from tersor.planning.calibration import Calibration

EFFORTS = {"fast": Effort(0, 0), "normal": Effort(2, 2, 2), "best": Effort(6, 4, 4)}


@dataclasses.dataclass(frozen=True)
class PackSettings(Texts):
    """Everything `write_packed` may be told besides source, output and budget.

    Attributes
    ----------
    effort : str
        `"fast"`, `"normal"` or `"best"`: how often levels and scales are chosen again.
    device : str
        Where the model runs and matrices are encoded.
    dense : tuple of str or None
        Shell patterns of parameters that stay as they are; see `CompressSettings`.
    leave_out : tuple of str
        Shell patterns of tensors to leave out, among those that no parameter takes.
    head : bool
        Pack the matrix of a language model's head as well, where it is no embedding.
    schemes : tuple of str
        Shell patterns of the schemes that matrices may have, such as `"w4*"`; none: all.
    asymmetric : bool
        Asymmetric schemes too. Servers load them; transformers (5.23, with compressed-tensors 0.20.1) does not, since
        it expects zeros that are not packed.
    whole : bool
        Keep the whole model in memory while text runs through it.
    """

    effort: str = "normal"
    device: str = "cpu"
    dense: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] = ()
    head: bool = False
    schemes: tuple[str, ...] = ()
    asymmetric: bool = False
    whole: bool = False

    def reading(self, source: Source, folder: Path) -> Reading | None:
        """Return the calibration text as a source reads it, if there is to be any calibration."""
        return Reading.of(source, self.text_seen, self.sampling, folder, devices=(self.device,),
                          whole=self.whole) if self.calibrated else None


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be spent.

    Attributes
    ----------
    nbytes : int
    linears : bool
        On levels, scales and zeros of the packed matrices only; else on shards, index and configuration.
    """

    nbytes: int
    linears: bool


@exclusive("output")
def write_packed(source: str | Path, output: str | Path, rate: float | None = None, *, size: int | None = None,
                 linears: float | None = None, settings: PackSettings | None = None,
                 progress: Progress = no_progress, **changes: Any) -> dict[str, Any]:
    """Write a model in the format of compressed-tensors within a byte budget, verify it, and evaluate it.

    Parameters
    ----------
    source : path
        A transformers directory, or a .gguf file.
    output : path
        A new directory; appears only when verified. `OUT.work` beside it keeps the stages' files.
    rate : float or None
        Bits per parameter over **all** parameters, every file that counts counted.
    size : int or None
        Bytes of the same files, instead of a rate.
    linears : float or None
        Instead of both: bits a weight of the packed matrices alone, scales and zeros counted.
    settings : PackSettings or None
        Everything else; `**changes` replace its fields.

    Returns
    -------
    dict
        The report: `summary`, `matrices` by name, `shards`, `evaluation`, `left_dense`, `ledger`, `provenance`.

    Raises
    ------
    TersorError
        Its subclasses; FileExistsError if the output exists.
    """
    chosen, began = dataclasses.replace(settings or PackSettings(), **changes), time.perf_counter()
    if chosen.effort not in EFFORTS:
        raise CodecConfigError(f"effort: expected one of {', '.join(EFFORTS)}, found {chosen.effort!r}")
    chosen = dataclasses.replace(chosen, device=usable_device(chosen.device))
    work = WorkFolder(Path(output)).claim()
    opened = open_for_grids(Path(source), work / "staged", dense=chosen.dense, leave_out=chosen.leave_out,
                            head=chosen.head)
    budget = _budget(opened, rate, size, linears)
    try:
        ladders = _ladders(opened, budget, chosen)
        _check(opened, ladders, budget, chosen)
    except TersorError:
        work.clear("staged")
        raise
    mark = _mark(opened, chosen)
    asked = [mark, dataclasses.asdict(budget), sorted(chosen.schemes), chosen.asymmetric]
    work.stamp(seal(asked), resume=chosen.resume)
    report = _stages((opened, ladders), budget, chosen, work, progress)
    report["summary"] |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()}
    write_json(work / "output" / REPORT, report)
    work.finish("matrices", "staged", "activations", "sides")
    return report


def _budget(source: Source, rate: float | None, size: int | None, linears: float | None) -> Budget:
    if linears is None:
        return Budget(budget_bytes(source.elements, rate, size), linears=False)
    if rate is not None or size is not None:
        raise CodecConfigError("--linears: a budget of its own; leave out --rate and --size")
    return Budget(budget_bytes(_weights(source), linears, None), linears=True)


def _weights(source: Source) -> int:
    """Return the weights of matrices that are packed."""
    return sum(m.shape[0] * m.shape[1] for m in source.layout.matrices.values())


def _ladders(source: Source, budget: Budget, settings: PackSettings) -> dict[str, list[Scheme]]:
    """Return the schemes that are tried on each matrix."""
    plain = 0 if budget.linears else plan.plain_nbytes(source)
    rate = 8 * max(0, budget.nbytes - plain) / _weights(source)
    found: dict[str, list[Scheme]] = {}
    for name, matrix in source.layout.matrices.items():
        known = ladder(matrix.shape[1], asymmetric=settings.asymmetric)
        listed = [scheme for scheme in known if not settings.schemes or any(
            fnmatch.fnmatchcase(scheme.name, pattern) for pattern in settings.schemes)]
        if not listed:
            raise CodecConfigError(f"--schemes {','.join(settings.schemes)}: none of them takes '{name}', whose rows "
                                   f"have {matrix.shape[1]} weights; {known[0].name} would, or leave it dense by "
                                   "--dense")
        found[name] = survey.near(listed, matrix.shape, rate)
    return found


def _check(source: Source, ladders: Mapping[str, Sequence[Scheme]], budget: Budget, settings: PackSettings) -> None:
    """Refuse before any work what would fail after it."""
    least = {name: listed[0] for name, listed in ladders.items()}
    needed = sum(s.nbytes(source.layout.matrices[n].shape) for n, s in least.items()) if budget.linears else (
        plan.predict(source, least))
    if needed > budget.nbytes:
        raise plan.least_error(source, needed, budget.nbytes, linears=budget.linears)
    if settings.calibrated or settings.evaluation_tokens:
        check_text(model_class(source.config))
    reading = settings.reading(source, Path())
    if settings.evaluation_tokens:
        read_ids(source, settings.heldout, settings.context, settings.evaluation_tokens)
    check_numbers(source, reading, settings.device)


def _mark(source: Source, settings: PackSettings) -> list[Any]:
    """Return what the bytes of a matrix depend on, besides the plan."""
    seen = [text_source(settings.text_seen), dataclasses.asdict(settings.sampling)] if settings.calibrated else None
    return [tersor.__version__, source.fingerprint, source.companion_digests, source.ledger.summary(), seen,
            settings.effort, settings.device]


def _stages(model: tuple[Source, Mapping[str, Sequence[Scheme]]], budget: Budget, settings: PackSettings,
            work: WorkFolder, progress: Progress) -> dict[str, Any]:
    """Run the stages, each from the files of those before it; return the report of a verified output."""
    source, ladders = model
    reading = settings.reading(source, work / "activations")
    tell = Teller(progress, work, source.nbytes, lambda: "" if reading is None else reading.place)
    known, rows = _sensitivities(reading, settings, work, tell)
    mark = [*_mark(source, settings), None if known is None else known.sha256]
    tried = survey.run(source, known, ladders, work / "survey.jsonl", reading=reading, device=settings.device,
                       mark=mark, progress=tell)
    picks = plan.spent(source, tried, budget.nbytes, linears=budget.linears)
    write_json(work / "plan.json", {name: scheme.name for name, scheme in picks.items()})
    job = Job(source, picks, EFFORTS[settings.effort], plan.scale_dtype(source), mark, rows)
    desk = GridDesk(job, work / "matrices", tell)
    if reading is None:
        desk.encode([Wanted(name, lambda matrix=matrix: (read_matrix(source, matrix, settings.device),), (), False)
                     for name, matrix in source.layout.matrices.items()])
    else:
        encode.by_blocks(desk, reading, work)
    directory.write(source, desk, work / "output")
    report = _report(source, desk, tried, budget, work)
    write_json(work / "output" / REPORT, report)
    report["summary"] |= {"worst_relative_error": verify(work / "output", source, tell)["worst_relative_error"]}
    if settings.evaluation_tokens:
        opened = open_source(work / "output", work / "staged", dense=())
        report["evaluation"] = evaluate_dense(opened, source, settings.heldout, context=settings.context,
                                              tokens=settings.evaluation_tokens, device=settings.device, progress=tell)
    seen = None if known is None else {"tokens": known.tokens, "source": known.source}
    report["provenance"] = {"tersor": tersor.__version__, **source.fingerprints, "calibration": seen,
                            "effort": settings.effort, "schemes": list(settings.schemes),
                            "asymmetric": settings.asymmetric}
    return report


def _sensitivities(reading: Reading | None, settings: PackSettings, work: WorkFolder,
                   tell: Progress) -> tuple[Calibration | None, Sides | None]:
    if reading is None:
        return None, None
    traces = work / "sensitivities.json"
    if not EFFORTS[settings.effort].across:
        return calibrate.sensitivities(reading, traces, tell), None
    return sides.measured(reading, traces, work / "sides", tell)


def _report(source: Source, desk: GridDesk, tried: survey.Tried, budget: Budget, work: WorkFolder) -> dict[str, Any]:
    total = directory.nbytes(work / "output")
    packed = sum(line["nbytes"] for line in desk.report.values())
    if (packed if budget.linears else total) > budget.nbytes:
        raise TersorError(f"internal: wrote {packed} bytes of packed matrices, {total} in all, for a budget of "
                          f"{budget.nbytes}")
    weights = _weights(source)
    plain = {name: TensorSpec(tuple(size), source.dtypes[name]).nbytes for name, size in source.layout.plain.items()
             if len(size) > 1}
    counted = Counter(line["scheme"] for line in desk.report.values())
    summary = {"bytes": total, "budget": budget.nbytes, "rate": 8 * total / source.elements,
               "parameters": source.elements, "bytes_original": source.original_nbytes, "bytes_packed": packed,
               "rate_packed": 8 * packed / weights, "weights_packed": weights, "schemes": dict(sorted(counted.items()))}
    groups = [names for names in fused(tried.leaders).values() if len(names) > 1]
    return {"summary": summary, "matrices": {name: desk.report[name] for name in desk.job.picks},
            "shards": directory.digests(work / "output"), "fused": groups, "left_dense": plain,
            "ledger": source.ledger.report()}
