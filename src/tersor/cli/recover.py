"""Recovery of compressed models: recover."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli.base import (
    AsJson,
    CalibrationText,
    Context,
    Device,
    EvaluationTokens,
    HeldoutText,
    Resume,
    Seed,
    device_of,
    directory,
    emit,
    existing_model,
)
from tersor.cli.funnel import existing
from tersor.cli.telling import Bars

Recover = Annotated[bool, typer.Option("--recover", help="train what is not encoded yet, then scales and norms")]
RecoverPasses = Annotated[float, typer.Option(help="times that recovery reads its text")]
TextTokens = Annotated[int, typer.Option(min=1, help="tokens that recovery reads of it, at most")]
RecoverBlocks = Annotated[bool, typer.Option("--recover-blocks", help="as --recover, a block at a time: for models "
                                                                      "that do not fit")]
RecoverOwn = Annotated[float | None, typer.Option(min=0, max=1, show_default="0.5; by blocks 0",
                                                  help="share of that text that the original writes itself")]
RecoverTokens = Annotated[int, typer.Option("--tokens", min=1, help="tokens of the text, at most")]


def recover(path: Annotated[Path, typer.Argument(metavar="OUT", help="a compressed model; it is only read")],
            against: Annotated[Path, typer.Option(help="the original model")],
            output: Annotated[Path | None, typer.Argument(metavar="RECOVERED", help="directory to write; may not exist",
                                                          show_default="OUT.recovered")] = None,
            calibration: CalibrationText = None, tokens: RecoverTokens = 262144,
            passes: Annotated[float, typer.Option(help="times that the text is read")] = 2.0,
            own: RecoverOwn = None, text: HeldoutText = None, evaluation_tokens: EvaluationTokens = 8192,
            context: Context = 512, seed: Seed = 0, device: Device = "cpu", resume: Resume = True,
            as_json: AsJson = False) -> None:
    """Train a compressed model's scales and norms. Their original is the teacher; bytes stay, and so do codes."""
    from tersor.hf.compress.recover import RecoverSettings, recover_model

    existing(path, "a model compressed by tersor")
    existing_model(against)
    output = output or path.with_name(f"{path.name}.recovered")
    directory(output)
    settings = RecoverSettings(calibration, tokens, passes, context, seed, device_of(device), resume, text,
                               evaluation_tokens, own=own)
    with Bars() as progress:
        report = recover_model(path, output, against, settings=settings, progress=progress)
    emit({**report["summary"], **figures(report), **report.get("evaluation", {})}, as_json, f"{path} → {output}")


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Return what a report says of recovery, for a table: KL on the text kept apart, and steps; nothing without one."""
    found = report.get("recovery")
    return {} if found is None else {"kl_apart_before": found["kl_before"], "kl_apart_after": found["kl_after"],
                                     "steps": found["steps"]}
