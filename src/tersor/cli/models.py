"""Commands on models: families, compress and its stages, evaluate."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

import tersor
from tersor.cli.base import (
    RATE,
    AsJson,
    BudgetRate,
    Calib,
    CalibrationText,
    Codec,
    Context,
    Dense,
    Device,
    Devices,
    Effort,
    Engine,
    EvaluationTokens,
    HeldoutText,
    LeaveOut,
    OptionTexts,
    Resume,
    Seed,
    Sensitivities,
    Size,
    Src,
    Tokens,
    Whole,
    device_of,
    directory,
    emit,
    existing_model,
    one_of,
    open_source,
    parse_options,
    read_calibration,
    read_json,
    refuse_existing,
)
from tersor.cli.figures import parse_size
from tersor.cli.formats import OWN, FileFormat, compress_to, format_of
from tersor.cli.funnel import existing
from tersor.cli.recover import Recover, RecoverBlocks, RecoverOwn, RecoverPasses, TextTokens, figures
from tersor.cli.reduce import REDUCTIONS
from tersor.cli.telling import VOICE, Bars
from tersor.errors import CodecConfigError
from tersor.families import DEFAULT
from tersor.files import exclusive
from tersor.planning.plan import to_json

NewOut = Annotated[Path, typer.Argument(metavar="OUT", help="output directory, or the file of another --format; must "
                                                              "not exist")]

SAMPLES = 3  # generations in the report


def read_weights(path: Path | None) -> dict[str, float]:
    """Read a sensitivities file."""
    if path is None:
        return {}
    record = read_json(path)
    if not isinstance(record, dict):
        raise CodecConfigError(f"{path}: expected a JSON object of matrix names and weights")
    return record


def families(as_json: AsJson = False) -> None:
    """List families that --codec takes, and reductions."""
    if as_json:
        typer.echo(json.dumps({"families": tersor.families(), "reductions": REDUCTIONS}))
        return
    typer.echo("\n".join(tersor.families()))
    typer.echo("\n".join(f"{name} (tersor reduce)" for name in REDUCTIONS))


@exclusive("output")
def compress(src: Src, output: NewOut, rate: BudgetRate = None, size: Size = None, codec: Codec = DEFAULT,
             calibration: CalibrationText = None,
             calibrated: Annotated[bool, typer.Option("--calibrated/--uncalibrated",
                                                      help="weigh errors by what text shows of the inputs")] = True,
             text: HeldoutText = None, tokens: Tokens = 65536, evaluation_tokens: EvaluationTokens = 8192,
             context: Context = 512, effort: Effort = None, seed: Seed = 0, device: Device = "cpu",
             devices: Devices = None, engine: Engine = None, option: OptionTexts = None,
             sensitivities: Sensitivities = None, dense: Dense = None, leave_out: LeaveOut = None,
             resume: Resume = True, whole_model: Whole = False,
             samples: Annotated[int, typer.Option(help="sample generations in the report; 0: none")] = SAMPLES,
             base_model: Annotated[str | None, typer.Option(help="OWNER/NAME of the original, for the card")] = None,
             recover: Recover = False, recover_passes: RecoverPasses = 3.0, recover_tokens: TextTokens = 262144,
             recover_blocks: RecoverBlocks = False, recover_own: RecoverOwn = None,
             dry_run: Annotated[bool, typer.Option("--dry-run", help="estimate bytes, memory and time only")] = False,
             file_format: FileFormat = OWN, as_json: AsJson = False) -> None:
    """Compress a model to a budget. Calibrates, surveys, plans, encodes, verifies and evaluates."""
    from tersor.cli.report import write_html
    from tersor.hf.compress import card, dryrun, run
    from tersor.hf.compress.request import Sampling

    if codec in REDUCTIONS:
        raise CodecConfigError(f"'{codec}' is a reduction, which has a verb of its own: tersor reduce SRC OUT "
                               f"--method {codec}")
    existing_model(src)
    if file_format != OWN:
        compress_to(file_format, (src, output), {
            "rate": rate, "size": size, "calibration": calibration, "calibrated": calibrated, "text": text,
            "tokens": tokens, "evaluation_tokens": evaluation_tokens, "context": context, "effort": effort,
            "seed": seed, "dense": dense, "resume": resume, "as_json": as_json, "leave_out": leave_out,
            "device": device, "whole_model": whole_model}, {
            "--codec": codec != DEFAULT, "--option": option, "--sensitivities": sensitivities, "--dry-run": dry_run,
            "--base-model": base_model, "--samples": samples != SAMPLES,
            "--devices": devices, "--engine": engine, "--recover": recover or recover_blocks})
        return
    directory(output)
    one_of(device, devices)
    settings = run.CompressSettings(
        method=codec, calibration=calibration, calibrated=calibrated, text=text, seed=seed, context=context,
        sampling=Sampling(tokens, context=context, seed=seed), evaluation_tokens=evaluation_tokens, resume=resume,
        device=device if dry_run else device_of(device), devices=devices, engine=engine, whole=whole_model,
        options=parse_options(option), sensitivities=read_weights(sensitivities), effort=effort, samples=samples,
        dense=None if dense is None else tuple(dense), leave_out=tuple(leave_out or ()), base_model=base_model,
        recover=recover, recover_passes=recover_passes, recover_tokens=recover_tokens,
        recover_blocks=recover_blocks, recover_own=recover_own)
    nbytes = None if size is None else parse_size(size)
    rate = 3.0 if rate is None and nbytes is None else rate
    if dry_run:
        emit(dryrun.estimate(src, output, rate, nbytes, settings), as_json, f"dry run: {src}")
        return
    with Bars() as progress:
        report = run.compress_model(src, output, rate, size=nbytes, settings=settings, progress=progress)
    if report.get("copied"):
        VOICE.get().say(f"the budget of {report['summary']['budget']} bytes is no smaller than the original "
                        f"({report['summary']['bytes']} bytes): copied it as it is")
        emit(report["summary"], as_json, str(output))
        return
    page = write_html(report, output.with_name(f"{output.name}.report.html"), card.headline(report),
                      card.loading(output, output.name))
    record = {**report["summary"], **figures(report), **report.get("evaluation", {}), "report": str(page)}
    emit(record, as_json, f"{src} → {output}")


@exclusive("output")
def calibrate(src: Src, output: Annotated[Path, typer.Argument(metavar="CALIB", help="file to write")],
              text: CalibrationText = None,
              tokens: Annotated[int, typer.Option(min=1, help="tokens for the moments")] = 65536,
              fisher_tokens: Annotated[int, typer.Option(min=0, help="tokens for sensitivities, and from 32,768 on "
                                                         "for how errors of rows add up; 0: none")] = 32768,
              context: Context = 512, seed: Seed = 0, device: Device = "cpu", whole_model: Whole = False,
              as_json: AsJson = False) -> None:
    """Collect the moments of inputs, and sensitivities. Keeps them all; compress does without."""
    from tersor.hf.compress import calibrate as stage
    from tersor.hf.compress.request import Sampling
    from tersor.hf.models.text import default_calibration

    refuse_existing(output)
    with Bars() as progress:
        found = stage.run(open_source(src, output), text or default_calibration(), output,
                          Sampling(tokens, fisher_tokens, context, seed), device=device_of(device), whole=whole_model,
                          progress=progress)
    emit({"tokens": found.tokens, "matrices": len(found.hessians), "source": found.source, "file": str(output)},
         as_json, "calibration")


@exclusive("output")
def survey(src: Src, output: Annotated[Path, typer.Argument(metavar="SURVEY", help="survey.jsonl to write or resume")],
           rate: Annotated[float, typer.Option(help=RATE)] = 3.0, calib: Calib = None, codec: Codec = DEFAULT,
           effort: Effort = None, seed: Seed = 0, device: Device = "cpu", option: OptionTexts = None,
           dense: Dense = None, leave_out: LeaveOut = None, as_json: AsJson = False) -> None:
    """Try every rung near a rate on every matrix. Writes one JSON line a trial."""
    from tersor.hf.compress import survey as stage
    from tersor.hf.compress.request import Request, budget_bytes

    source = open_source(src, output, dense, leave_out)
    request = Request(budget_bytes(source.elements, rate, None), codec, seed, parse_options(option), effort=effort)
    with Bars() as progress:
        choices = stage.run(source, read_calibration(calib), request, output, device=device_of(device),
                            progress=progress)
    emit({"matrices": len(choices), "trials": sum(map(len, choices.values())), "file": str(output)}, as_json, "survey")


@exclusive("output")
def plan(src: Src, survey_file: Annotated[Path, typer.Argument(metavar="SURVEY")],
         output: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json to write; edit it then if you like")],
         rate: BudgetRate = None, size: Size = None, calib: Calib = None, codec: Codec = DEFAULT,
         effort: Effort = None, seed: Seed = 0, option: OptionTexts = None, sensitivities: Sensitivities = None,
         dense: Dense = None, leave_out: LeaveOut = None, as_json: AsJson = False) -> None:
    """Spend one budget over all matrices. Writes a codec for each, as JSON."""
    from tersor.files import write_json
    from tersor.hf.compress import plan as stage
    from tersor.hf.compress import survey
    from tersor.hf.compress.request import Request, budget_bytes, provenance

    refuse_existing(output)
    source = open_source(src, output, dense, leave_out)
    nbytes = None if size is None else parse_size(size)
    budget = budget_bytes(source.elements, 3.0 if rate is None and nbytes is None else rate, nbytes)
    request = Request(budget, codec, seed, parse_options(option), read_weights(sensitivities), effort)
    calibration = read_calibration(calib)
    record = provenance(source, calibration, request, tersor.__version__)
    existing(survey_file, "a file written by 'tersor survey'")
    choices = survey.run(source, calibration, request, survey_file)
    picks = stage.run(source, choices, request, record)
    write_json(output, to_json(picks))
    emit({"budget": budget, "bytes": stage.predict(source, picks, record), "file": str(output)}, as_json, "plan")


def evaluate(path: Annotated[Path, typer.Argument(metavar="OUT", help="a compressed model")],
             against: Annotated[Path, typer.Option(help="the original model")],
             text: HeldoutText = None, context: Context = 512,
             stride: Annotated[int | None, typer.Option(min=1, help="tokens between two windows",
                                                        show_default="the context")] = None,
             tokens: Annotated[int | None, typer.Option(min=1, help="use at most this many tokens",
                                                        show_default="all of the text")] = None,
             device: Device = "cpu",
             generate: Annotated[int, typer.Option(min=0, help="time so many tokens of generation by both models; the "
                                                                   "original is loaded whole; 0: none")] = 0,
             as_json: AsJson = False) -> None:
    """Compare a compressed model with its original. Perplexity, KL, top-1 agreement, sizes and speed.

    Speeds are of prompts (windows of the text, several at a time) and of decoding (one sequence, token by token).
    """
    from tersor.hf.models.evaluate import evaluate as run_evaluation
    from tersor.hf.models.evaluate import evaluate_dense
    from tersor.hf.models.source import open_source as open_any
    from tersor.hf.models.speed import LEAST, speeds
    from tersor.hf.models.text import default_heldout

    if generate and generate < LEAST:
        raise CodecConfigError(f"--generate takes 0 or at least {LEAST} tokens, found {generate}")
    existing(path, "a model compressed by tersor")
    if format_of(path) != OWN:  # it is read as any model is
        if generate:
            raise CodecConfigError(f"{path}: --generate times what tersor compress writes; leave it out")
        with tempfile.TemporaryDirectory() as staged, Bars() as progress:
            opened = open_any(path, Path(staged), dense=())
            record = evaluate_dense(opened, open_source(against, path), text or default_heldout(), context=context,
                                    stride=stride, tokens=tokens, device=device_of(device), progress=progress)
        emit({**record, "bytes": opened.original_nbytes}, as_json, f"{path} against {against}")
        return
    with Bars() as progress:
        record = run_evaluation(path, open_source(against, path), text or default_heldout(), context=context,
                                stride=stride, tokens=tokens, device=device_of(device), progress=progress)
        if generate:
            record |= speeds(path, open_source(against, path), text or default_heldout(), generate,
                             device=device_of(device))
    emit(record, as_json, f"{path} against {against}")


def status(path: Annotated[Path, typer.Argument(metavar="OUT.work", help="the work folder of a run, or its output")],
           as_json: AsJson = False) -> None:
    """Tell how far a run is, and whether it still runs."""
    from tersor.hf.compress.status import status as run_status

    record = run_status(path)
    emit(record, as_json, str(path))
