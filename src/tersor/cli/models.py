"""Commands on models: families, compress and its stages, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import tersor
from tersor.cli import reduce
from tersor.cli.base import (
    AsJson,
    Bars,
    Calib,
    CodecText,
    Context,
    Device,
    Method,
    OptionTexts,
    Rate,
    Seed,
    Sensitivities,
    Size,
    Src,
    app,
    emit,
    err,
    open_source,
    parse_options,
    parse_size,
    read_calibration,
)
from tersor.errors import CodecConfigError, ModelError
from tersor.families import DEFAULT
from tersor.planning import plan as planning


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
             keep: Annotated[float | None, typer.Option(help="svd, asvd, rom…: share of linears' parameters")] = None,
             allocation: Annotated[str | None, typer.Option(help="rom…: uniform, last or water")] = None,
             storage: Annotated[str | None, typer.Option(help="rom…: pair or gauge")] = None,
             bias: Annotated[bool | None, typer.Option("--bias/--no-bias", help="rom…: centred, with a bias")] = None,
             factor_codec: Annotated[str | None, typer.Option(help="rom…: how factors are stored")] = None,
             evaluation_tokens: Annotated[int, typer.Option(help="evaluation tokens; 0: none")] = 8192,
             context: Annotated[int | None, typer.Option(help="window length in tokens; 512, rom… 128")] = None,
             seed: Seed = 0, device: Device = "cpu", option: OptionTexts = None,
             sensitivities: Sensitivities = None,
             resume: Annotated[bool, typer.Option("--resume/--no-resume")] = True,
             dry_run: Annotated[bool, typer.Option("--dry-run", help="estimate bytes, memory and time only")] = False,
             as_json: AsJson = False) -> None:
    """Compress a model to a budget: calibrate, survey, plan, encode, verify, evaluate.

    Methods svd, asvd, rom_released, rom and rom_plus reduce linears to a share of their parameters instead (--keep).
    """
    from tersor.cli.report import write_html
    from tersor.hf.compress import dryrun, run
    from tersor.hf.compress.request import Sampling

    given = reduce.Given(keep, size, allocation, storage, bias, factor_codec)
    if codec is None and method in reduce.REDUCTIONS:
        reduce.refuse(rate, device, calibrated=calibrated, dry_run=dry_run, others=bool(option or sensitivities))
        reduce.reduce(src, output, method, given, calibration=calibration, text=text, tokens=tokens,
                      length=context or reduce.LENGTH, evaluation_tokens=evaluation_tokens, context=context or 512,
                      seed=seed, resume=resume, as_json=as_json)
        return
    reduce.check_unused(codec or method, given)
    context = 512 if context is None else context
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
    from tersor.hf.compress import calibrate as calibrates
    from tersor.hf.compress.request import Sampling
    from tersor.hf.models.text import default_calibration

    with Bars() as progress:
        found = calibrates.calibrate(open_source(src, output), text or default_calibration(), output,
                                   Sampling(tokens, fisher_tokens, context, seed), device=device,
                                   progress=progress)
    emit({"tokens": found.tokens, "matrices": len(found.hessians), "source": found.source, "file": str(output)},
         as_json, "calibration")


@app.command()
def survey(src: Src, output: Annotated[Path, typer.Argument(metavar="SURVEY", help="survey.jsonl to write or resume")],
           rate: Rate = 3.0, calib: Calib = None, method: Method = DEFAULT, seed: Seed = 0,
           device: Device = "cpu", option: OptionTexts = None, as_json: AsJson = False) -> None:
    """Try every rung near a rate on every matrix: one JSON line a trial."""
    from tersor.hf.compress import survey as surveying
    from tersor.hf.compress.request import Request, budget_bytes

    source = open_source(src, output)
    request = Request(budget_bytes(source, rate, None), method, seed, parse_options(option))
    with Bars() as progress:
        choices = surveying.survey(source, read_calibration(calib), request, output, device=device, progress=progress)
    emit({"matrices": len(choices), "trials": sum(map(len, choices.values())), "file": str(output)}, as_json, "survey")


@app.command()
def plan(src: Src, survey_file: Annotated[Path, typer.Argument(metavar="SURVEY")],
         output: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json to write; edit it if you like")],
         rate: Rate = None, size: Size = None, calib: Calib = None, method: Method = DEFAULT,
         seed: Seed = 0, option: OptionTexts = None, sensitivities: Sensitivities = None,
         as_json: AsJson = False) -> None:
    """Spend one budget over all matrices: a codec for each, as JSON."""
    from tersor.files import write_json
    from tersor.hf.compress import survey as surveying
    from tersor.hf.compress.plan import make_plan, predict
    from tersor.hf.compress.request import Request, budget_bytes, provenance

    source = open_source(src, output)
    nbytes = None if size is None else parse_size(size)
    budget = budget_bytes(source, 3.0 if rate is None and nbytes is None else rate, nbytes)
    request = Request(budget, method, seed, parse_options(option), read_weights(sensitivities))
    calibration = read_calibration(calib)
    record = provenance(source, calibration, request, tersor.__version__)
    if not survey_file.is_file():
        raise ModelError(f"{survey_file}: no such file; make it with 'tersor survey'")
    choices = surveying.survey(source, calibration, request, survey_file)
    picks = make_plan(source, choices, request, record)
    write_json(output, planning.to_json(picks))
    emit({"budget": budget, "bytes": predict(source, picks, record), "file": str(output)}, as_json, "plan")


@app.command()
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
