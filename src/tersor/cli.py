"""The command-line tool: argument parsing and printing only. Exit codes: 0 ok, 2 usage, 3 verification failed."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import tersor
from tersor import plan as planning
from tersor import store
from tersor.api import as_matrix
from tersor.calibration import Calibration
from tersor.errors import BudgetError, CodecConfigError, ModelError, TersorError
from tersor.families import DEFAULT
from tersor.quality import measure

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Tersor makes matrices terse: models and matrices in the fewest bytes for the least error.")
out, err = Console(), Console(stderr=True)

Src = Annotated[Path, typer.Argument(help="a transformers model directory, or a .gguf file")]
Out = Annotated[Path, typer.Argument(help="output directory; must not exist")]
Rate = Annotated[float | None, typer.Option(help="bits per element, everything stored counted")]
Size = Annotated[str | None, typer.Option(help="size on disk instead of a rate: 5MB, 900kB, 2GB (1 MB = 10^6 bytes)")]
Method = Annotated[str, typer.Option(help="a family (see `tersor families`)")]
CodecText = Annotated[str | None, typer.Option("--codec", help="a codec string, such as rot,lm3 or rtn4g64")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Seed = Annotated[int, typer.Option(help="seed of the encoder's search")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
OptionTexts = Annotated[list[str] | None, typer.Option("--option", help="encoder option, name=value; repeatable")]
Sensitivities = Annotated[Path | None, typer.Option(help="JSON: matrix name to weight of its relative distortion")]
Calib = Annotated[Path | None, typer.Option("--calib", help="file written by `tersor calibrate`")]
Context = Annotated[int, typer.Option(help="window length in tokens")]


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `5MB`; 1 MB = 10^6 bytes.

    Raises
    ------
    BudgetError
        If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)B?\s*", text)
    if not match:
        raise BudgetError(f"size '{text}': expected a number and a unit, such as 5MB, 900kB, 2GB or 123456", 0.0)
    return int(float(match[1]) * {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def parse_options(texts: list[str] | None) -> dict[str, Any]:
    """Return encoder options from `name=value` texts; values are JSON where they parse, else strings."""
    options: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise CodecConfigError(f"--option '{text}': expected name=value")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


class Bars:
    """Progress bars on stderr, one a stage."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                   TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=err, transient=not err.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._progress.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


def emit(record: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a flat record as JSON or as a two-column table."""
    if as_json:
        typer.echo(json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False))
        return
    table = Table(title=title, show_header=False)
    for key, value in record.items():
        if not isinstance(value, (dict, list)):
            table.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
    out.print(table)


def _finite(value: Any) -> Any:
    """Return None for infinities and NaN, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_weights(path: Path | None) -> dict[str, float]:
    """Read a sensitivities file."""
    if path is None:
        return {}
    try:
        record = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CodecConfigError(f"{path}: expected a JSON object of matrix names and weights: {error}") from error
    if not isinstance(record, dict):
        raise CodecConfigError(f"{path}: expected a JSON object of matrix names and weights")
    return record


@app.command()
def families(as_json: AsJson = False) -> None:
    """List the families that --method and --codec accept."""
    typer.echo(json.dumps(tersor.families()) if as_json else "\n".join(tersor.families()))


@app.command()
def compress(src: Src, output: Annotated[Path, typer.Argument(metavar="OUT", help="output directory; must not exist")],
             rate: Rate = None, size: Size = None, method: Method = DEFAULT, codec: CodecText = None,
             calibration: Annotated[Path | None, typer.Option(help="calibration text; default: packaged")] = None,
             calibrated: Annotated[bool, typer.Option("--calibrated/--uncalibrated")] = True,
             text: Annotated[Path | None, typer.Option(help="held-out text; default: packaged")] = None,
             tokens: Annotated[int, typer.Option(help="calibration tokens")] = 65536,
             evaluation_tokens: Annotated[int, typer.Option(help="evaluation tokens; 0: none")] = 8192,
             context: Context = 512, seed: Seed = 0, device: Device = "cpu", option: OptionTexts = None,
             sensitivities: Sensitivities = None,
             resume: Annotated[bool, typer.Option("--resume/--no-resume")] = True,
             dry_run: Annotated[bool, typer.Option("--dry-run", help="estimate bytes, memory and time only")] = False,
             as_json: AsJson = False) -> None:
    """Compress a model to a budget: calibrate, survey, plan, encode, verify, evaluate."""
    from tersor.hf import dryrun, run
    from tersor.hf.request import Sampling
    from tersor.report import write_html

    sampling = Sampling(tokens, context=context, seed=seed)
    settings = run.Settings(codec or method, calibration, calibrated, text, sampling, evaluation_tokens, context, seed,
                            device, resume, parse_options(option), read_weights(sensitivities))
    nbytes = None if size is None else parse_size(size)
    rate = 3.0 if rate is None and nbytes is None else rate
    if dry_run:
        emit(dryrun.estimate(src, output, rate, nbytes, settings), as_json, f"dry run: {src}")
        return
    with Bars() as progress:
        report = run.compress_model(src, output, rate, size=nbytes, settings=settings, progress=progress)
    if report.get("copied"):
        err.print(f"the budget of {report['summary']['budget']} bytes is no smaller than the original "
                  f"({report['summary']['bytes']} bytes): copied it as it is")
        emit(report["summary"], as_json, str(output))
        return
    page = write_html(report, output.with_name(f"{output.name}.report.html"))
    record = {**report["summary"], **report.get("evaluation", {}), "report": str(page)}
    emit(record, as_json, f"{src} → {output}")


@app.command()
def calibrate(src: Src, output: Annotated[Path, typer.Argument(metavar="CALIB", help="file to write")],
              text: Annotated[Path | None, typer.Option("--calibration", help="text; default: packaged")] = None,
              tokens: Annotated[int, typer.Option(help="tokens for the moments")] = 65536,
              fisher_tokens: Annotated[int, typer.Option(help="tokens for sensitivities; 0: none")] = 4096,
              context: Context = 512, seed: Seed = 0, device: Device = "cpu", as_json: AsJson = False) -> None:
    """Collect the second moments of every matrix's inputs, and its sensitivity."""
    from tersor.hf import pipeline
    from tersor.hf.request import Sampling
    from tersor.hf.text import default_calibration

    with Bars() as progress:
        found = pipeline.calibrate(_open(src, output), text or default_calibration(), output,
                                   Sampling(tokens, fisher_tokens, context, seed), device=device,
                                   progress=progress)
    emit({"tokens": found.tokens, "matrices": len(found.hessians), "source": found.source, "file": str(output)},
         as_json, "calibration")


@app.command()
def survey(src: Src, output: Annotated[Path, typer.Argument(metavar="SURVEY", help="survey.jsonl to write or resume")],
           rate: Rate = 3.0, calib: Calib = None, method: Method = DEFAULT, seed: Seed = 0,
           device: Device = "cpu", option: OptionTexts = None, as_json: AsJson = False) -> None:
    """Try every rung near a rate on every matrix: one JSON line a trial."""
    from tersor.hf import run
    from tersor.hf import survey as surveying
    from tersor.hf.request import Request

    source = _open(src, output)
    request = Request(run.budget_bytes(source, rate, None), method, seed, parse_options(option))
    with Bars() as progress:
        choices = surveying.survey(source, _calibration(calib), request, output, device=device, progress=progress)
    emit({"matrices": len(choices), "trials": sum(map(len, choices.values())), "file": str(output)}, as_json, "survey")


@app.command()
def plan(src: Src, survey_file: Annotated[Path, typer.Argument(metavar="SURVEY")],
         output: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json to write; edit it if you like")],
         rate: Rate = None, size: Size = None, calib: Calib = None, method: Method = DEFAULT,
         seed: Seed = 0, option: OptionTexts = None, sensitivities: Sensitivities = None,
         as_json: AsJson = False) -> None:
    """Spend one budget over all matrices: a codec for each, as JSON."""
    from tersor.hf import pipeline, run
    from tersor.hf import survey as surveying
    from tersor.hf.request import Request

    source = _open(src, output)
    nbytes = None if size is None else parse_size(size)
    budget = run.budget_bytes(source, 3.0 if rate is None and nbytes is None else rate, nbytes)
    request = Request(budget, method, seed, parse_options(option), read_weights(sensitivities))
    calibration = _calibration(calib)
    record = pipeline.provenance(source, calibration, request, tersor.__version__)
    if not survey_file.is_file():
        raise ModelError(f"{survey_file}: no such file; make it with 'tersor survey'")
    choices = surveying.survey(source, calibration, request, survey_file)
    picks = pipeline.make_plan(source, choices, request, record)
    run.write_json(output, planning.to_json(picks))
    emit({"budget": budget, "bytes": pipeline.predict(source, picks, record), "file": str(output)}, as_json, "plan")


@app.command()
def encode(src: Annotated[Path, typer.Argument(help="a model directory or .gguf with --plan; or MATRIX.npy")],
           output: Annotated[Path | None, typer.Argument(metavar="OUT")] = None,
           plan_file: Annotated[Path | None, typer.Option("--plan", help="plan.json, for models")] = None,
           calib: Calib = None, rate: Rate = None, codec: CodecText = None, seed: Seed = 0, device: Device = "cpu",
           option: OptionTexts = None, as_json: AsJson = False) -> None:
    """Encode a model by a plan, or a matrix (.npy) by a codec string or a family at a rate."""
    target = output or src.with_suffix(".tersor")
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another output")
    if src.suffix == ".npy":
        if plan_file is not None or calib is not None or device != "cpu":
            raise CodecConfigError("--plan, --calib and --device are for models; a matrix takes --codec, --rate and "
                                   "--option")
        record = _encode_matrix(src, target, rate, "auto" if codec is None else codec, seed, parse_options(option))
        emit(record, as_json, str(target))
        return
    from tersor.hf import pipeline, run
    from tersor.hf.request import Request, check_device

    if plan_file is None or rate is not None or codec is not None:
        raise ModelError("encoding a model takes --plan, and no --rate or --codec; make a plan with 'tersor plan', or "
                         "use 'tersor compress'")
    check_device(device)
    picks = planning.from_json(_read_json(plan_file))
    source, calibration = _open(src, target), _calibration(calib)
    request = Request(source.nbytes, "plan", seed, parse_options(option))
    record = pipeline.provenance(source, calibration, request, tersor.__version__)
    work = run.claim(run.work_folder(target.resolve()))
    with Bars() as progress:
        report = pipeline.encode(pipeline.Job(source, picks, calibration, request, record), work, work / "output",
                                 device=device, progress=progress)
    emit(run.finish(source, report, record, work, target), as_json, str(target))


def _encode_matrix(src: Path, target: Path, rate: float | None, codec: str, seed: int,
                   options: dict[str, Any]) -> dict[str, Any]:
    try:
        array = np.load(src, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CodecConfigError(f"{src}: expected a .npy file of one float matrix: {error}") from error
    matrix = as_matrix(np.array(array))
    encoded = tersor.compress(matrix, rate, codec, seed, **options)
    tersor.save(target, encoded)
    quality = measure(matrix, encoded)
    return {"codec": str(encoded.codec), "shape": str(encoded.shape), "bytes": encoded.nbytes, "rate": encoded.rate,
            "relative_error": quality.relative_error, "sqnr_db": quality.sqnr, "shannon_gap_db": quality.shannon_gap,
            "bytes_on_disk": store.stored_nbytes(target)}


@app.command()
def evaluate(path: Annotated[Path, typer.Argument(metavar="OUT", help="a compressed model")],
             against: Annotated[Path, typer.Option(help="the original model")],
             text: Annotated[Path | None, typer.Option(help="held-out text; default: packaged")] = None,
             context: Context = 512, stride: Annotated[int | None, typer.Option(help="default: context")] = None,
             tokens: Annotated[int | None, typer.Option(help="use at most this many tokens")] = None,
             device: Device = "cpu", as_json: AsJson = False) -> None:
    """Perplexity, KL and top-1 agreement to the original, sizes and speed."""
    from tersor.hf.evaluate import evaluate as run_evaluation
    from tersor.hf.text import default_heldout

    with Bars() as progress:
        record = run_evaluation(path, _open(against, path), text or default_heldout(), context=context, stride=stride,
                                tokens=tokens, device=device, progress=progress)
    emit(record, as_json, f"{path} against {against}")


@app.command()
def inspect(path: Annotated[Path, typer.Argument(metavar="OUT")], as_json: AsJson = False) -> None:
    """Show what a compressed directory holds: codecs, shapes, bytes."""
    opened = store.read(path)
    rows = [{"name": name, "shape": list(e.shape), "codec": "plain" if e.codec is None else str(e.codec),
             "bytes": e.nbytes, "rate": 8 * e.nbytes / max(1, torch.Size(e.shape).numel())}
            for name, e in opened.entries.items()]
    nbytes, elements = store.stored_nbytes(path), store.params(opened)
    record = {"kind": opened.kind, "bytes": nbytes, "parameters": elements, "rate": 8 * nbytes / elements,
              "format_version": opened.manifest["format_version"], "provenance": opened.manifest["provenance"],
              "entries": rows}
    if not as_json:
        table = Table("name", "shape", "codec", "bytes", "bits/element")
        for row in rows:
            table.add_row(row["name"], "x".join(map(str, row["shape"])), row["codec"], str(row["bytes"]),
                          f"{row['rate']:.3f}")
        out.print(table)
    emit(record, as_json, str(path))


@app.command()
def verify(path: Annotated[Path, typer.Argument(metavar="OUT")],
           against: Annotated[Path | None, typer.Option(help="the original: errors are measured again")] = None,
           as_json: AsJson = False) -> None:
    """Verify digests, layouts, coverage and errors; exit status 3 if anything is wrong."""
    from tersor.hf.verify import verify as run_verification

    with Bars() as progress:
        record = run_verification(path, None if against is None else _open(against, path), progress)
    emit(record, as_json, f"verified: {path}")


@app.command()
def decode(path: Annotated[Path, typer.Argument(metavar="OUT")],
           to: Annotated[Path, typer.Option(help="a new model directory, or a .npy file for a single matrix")],
           as_json: AsJson = False) -> None:
    """Write the dense model, or matrix, that a compressed directory stands for."""
    if to.exists():
        raise FileExistsError(f"{to} exists; remove it or name another output")
    opened = store.read(path)
    if opened.kind == "matrix":
        _write_npy(to, opened.matrix(opened.matrix_names()[0]).decode().numpy())
    elif opened.kind == "model":
        from tersor.hf.dense import write_dense

        write_dense(opened, to)
    else:
        raise CodecConfigError(f"{path}: holds several matrices; load them with tersor.load")
    emit({"decoded": str(to), "matrices": len(opened.matrix_names())}, as_json, "decode")


def _write_npy(to: Path, array: np.ndarray) -> None:
    partial = to.with_name(f".{to.name}.partial-{os.getpid()}")
    try:
        with partial.open("xb") as handle:
            np.save(handle, array)
        partial.replace(to)
    except OSError as error:
        raise OSError(f"cannot write {to}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _open(src: Path, output: Path) -> Any:
    from tersor.hf.run import work_folder
    from tersor.hf.source import open_source

    return open_source(src, work_folder(output) / "staged")


def _calibration(path: Path | None) -> Calibration | None:
    return None if path is None else Calibration.load(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CodecConfigError(f"{path}: expected JSON: {error}") from error


def main() -> None:
    """Run the tool; every expected error is one line on stderr."""
    try:
        app()
    except TersorError as error:
        _fail(error, error.exit_code)
    except (OSError, MemoryError) as error:
        _fail(error, 2)


def _fail(error: BaseException, code: int) -> None:
    typer.echo(f"tersor: {' '.join(str(error).split()) or type(error).__name__}", err=True)
    sys.exit(code)
