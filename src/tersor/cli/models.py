"""Commands on models: families, compress and its stages, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import tersor
from tersor.cli.base import (
    AsJson,
    Bars,
    Calib,
    CalibrationText,
    CodecText,
    Context,
    Dense,
    Device,
    EvaluationTokens,
    HeldoutText,
    LeaveOut,
    Method,
    OptionTexts,
    Out,
    Rate,
    Resume,
    Seed,
    Sensitivities,
    Size,
    Src,
    Tokens,
    emit,
    err,
    open_source,
    parse_options,
    parse_size,
    read_calibration,
)
from tersor.cli.reduce import REDUCTIONS
from tersor.errors import CodecConfigError, ModelError
from tersor.families import DEFAULT
from tersor.files import exclusive, read_json
from tersor.planning.plan import to_json


def read_weights(path: Path | None) -> dict[str, float]:
    """Read a sensitivities file."""
    if path is None:
        return {}
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise CodecConfigError(f"{path}: expected a JSON object of matrix names and weights: {error}") from error
    if not isinstance(record, dict):
        raise CodecConfigError(f"{path}: expected a JSON object of matrix names and weights")
    return record


def families(as_json: AsJson = False) -> None:
    """List the families that --method and --codec accept, and the reductions of `tersor reduce`."""
    if as_json:
        typer.echo(json.dumps({"families": tersor.families(), "reductions": REDUCTIONS}))
        return
    typer.echo("\n".join(tersor.families()))
    typer.echo("\n".join(f"{name} (tersor reduce)" for name in REDUCTIONS))


@exclusive("output")
def compress(src: Src, output: Out, rate: Rate = None, size: Size = None, method: Method = DEFAULT,
             codec: CodecText = None, calibration: CalibrationText = None,
             calibrated: Annotated[bool, typer.Option("--calibrated/--uncalibrated")] = True,
             text: HeldoutText = None, tokens: Tokens = 65536, evaluation_tokens: EvaluationTokens = 8192,
             context: Context = 512, seed: Seed = 0, device: Device = "cpu", option: OptionTexts = None,
             sensitivities: Sensitivities = None, dense: Dense = None, leave_out: LeaveOut = None,
             resume: Resume = True,
             dry_run: Annotated[bool, typer.Option("--dry-run", help="estimate bytes, memory and time only")] = False,
             as_json: AsJson = False) -> None:
    """Compress a model to a budget: calibrate, survey, plan, encode, verify, evaluate."""
    from tersor.cli.report import write_html
    from tersor.hf.compress import dryrun, run
    from tersor.hf.compress.request import Sampling

    if codec is None and method in REDUCTIONS:
        raise CodecConfigError(f"'{method}' is a reduction, which has a verb of its own: tersor reduce SRC OUT "
                               f"--method {method}")
    settings = run.CompressSettings(
        codec or method, calibration, calibrated, text, Sampling(tokens, context=context, seed=seed),
        evaluation_tokens, context, seed, device, resume, parse_options(option), read_weights(sensitivities),
        tuple(dense or ()), tuple(leave_out or ()))
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


@exclusive("output")
def calibrate(src: Src, output: Annotated[Path, typer.Argument(metavar="CALIB", help="file to write")],
              text: Annotated[Path | None, typer.Option("--calibration", help="text; default: packaged")] = None,
              tokens: Annotated[int, typer.Option(help="tokens for the moments")] = 65536,
              fisher_tokens: Annotated[int, typer.Option(help="tokens for sensitivities; 0: none")] = 4096,
              context: Context = 512, seed: Seed = 0, device: Device = "cpu", as_json: AsJson = False) -> None:
    """Collect the second moments of every matrix's inputs, and its sensitivity."""
    from tersor.hf.compress import calibrate as stage
    from tersor.hf.compress.request import Sampling
    from tersor.hf.models.text import default_calibration

    with Bars() as progress:
        found = stage.run(open_source(src, output), text or default_calibration(), output,
                          Sampling(tokens, fisher_tokens, context, seed), device=device, progress=progress)
    emit({"tokens": found.tokens, "matrices": len(found.hessians), "source": found.source, "file": str(output)},
         as_json, "calibration")


@exclusive("output")
def survey(src: Src, output: Annotated[Path, typer.Argument(metavar="SURVEY", help="survey.jsonl to write or resume")],
           rate: Rate = 3.0, calib: Calib = None, method: Method = DEFAULT, seed: Seed = 0,
           device: Device = "cpu", option: OptionTexts = None, as_json: AsJson = False) -> None:
    """Try every rung near a rate on every matrix: one JSON line a trial."""
    from tersor.hf.compress import survey as stage
    from tersor.hf.compress.request import Request, budget_bytes

    source = open_source(src, output)
    request = Request(budget_bytes(source, rate, None), method, seed, parse_options(option))
    with Bars() as progress:
        choices = stage.run(source, read_calibration(calib), request, output, device=device, progress=progress)
    emit({"matrices": len(choices), "trials": sum(map(len, choices.values())), "file": str(output)}, as_json, "survey")


@exclusive("output")
def plan(src: Src, survey_file: Annotated[Path, typer.Argument(metavar="SURVEY")],
         output: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json to write; edit it if you like")],
         rate: Rate = None, size: Size = None, calib: Calib = None, method: Method = DEFAULT,
         seed: Seed = 0, option: OptionTexts = None, sensitivities: Sensitivities = None,
         as_json: AsJson = False) -> None:
    """Spend one budget over all matrices: a codec for each, as JSON."""
    from tersor.files import write_json
    from tersor.hf.compress import plan as stage
    from tersor.hf.compress import survey
    from tersor.hf.compress.request import Request, budget_bytes, provenance

    source = open_source(src, output)
    nbytes = None if size is None else parse_size(size)
    budget = budget_bytes(source, 3.0 if rate is None and nbytes is None else rate, nbytes)
    request = Request(budget, method, seed, parse_options(option), read_weights(sensitivities))
    calibration = read_calibration(calib)
    record = provenance(source, calibration, request, tersor.__version__)
    if not survey_file.is_file():
        raise ModelError(f"{survey_file}: no such file; make it with 'tersor survey'")
    choices = survey.run(source, calibration, request, survey_file)
    picks = stage.run(source, choices, request, record)
    write_json(output, to_json(picks))
    emit({"budget": budget, "bytes": stage.predict(source, picks, record), "file": str(output)}, as_json, "plan")


def evaluate(path: Annotated[Path, typer.Argument(metavar="OUT", help="a compressed model")],
             against: Annotated[Path, typer.Option(help="the original model")],
             text: Annotated[Path | None, typer.Option(help="held-out text; default: packaged")] = None,
             context: Context = 512, stride: Annotated[int | None, typer.Option(help="default: context")] = None,
             tokens: Annotated[int | None, typer.Option(help="use at most this many tokens")] = None,
             device: Device = "cpu", as_json: AsJson = False) -> None:
    """Perplexity, KL and top-1 agreement to the original, sizes and speed."""
    from tersor.hf.models.evaluate import evaluate as run_evaluation
    from tersor.hf.models.text import default_heldout

    with Bars() as progress:
        record = run_evaluation(path, open_source(against, path), text or default_heldout(), context=context,
                                stride=stride, tokens=tokens, device=device, progress=progress)
    emit(record, as_json, f"{path} against {against}")
