"""The command that writes packed integers, for vLLM, SGLang and transformers."""

from __future__ import annotations

from typing import Annotated

import typer

from tersor.cli.base import (
    SIZE,
    AsJson,
    CalibrationText,
    Context,
    Dense,
    Device,
    Effort,
    EvaluationTokens,
    HeldoutText,
    LeaveOut,
    Out,
    Resume,
    Seed,
    Src,
    Tokens,
    Whole,
    device_of,
    emit,
    existing_model,
)
from tersor.cli.figures import parse_size, size_text
from tersor.cli.telling import VOICE, Bars

TOTAL = "bits per parameter over all parameters, what stays dense counted"
LINEARS = "instead: bits a weight of the packed matrices alone, scales and zeros counted"


def compressed_tensors(
        src: Src, output: Out, rate: Annotated[float | None, typer.Option(help=TOTAL)] = None,
        size: Annotated[str | None, typer.Option(help=SIZE)] = None,
        linears: Annotated[float | None, typer.Option(metavar="BITS", help=LINEARS,
                                                      show_default="4.125, unless another is given")] = None,
        calibration: CalibrationText = None,
        calibrated: Annotated[bool, typer.Option("--calibrated/--uncalibrated",
                                                 help="weigh errors by what text shows of the inputs")] = True,
        text: HeldoutText = None, tokens: Tokens = 65536, evaluation_tokens: EvaluationTokens = 8192,
        context: Context = 512, effort: Effort = None, seed: Seed = 0, device: Device = "cpu",
        schemes: Annotated[str | None, typer.Option(metavar="PATTERNS", help="schemes that matrices may have, such as "
                                                    "'w4g128,w8*': bits, then g and the weights that share a scale, "
                                                    "or c for a row", show_default="all")] = None,
        asymmetric: Annotated[bool, typer.Option("--asymmetric", help="schemes with zeros, too (a at the end of their "
                                                 "names), which servers load and transformers does not")] = False,
        head: Annotated[bool, typer.Option("--head", help="pack the head too, where it is no embedding")] = False,
        dense: Dense = None, leave_out: LeaveOut = None, resume: Resume = True, whole_model: Whole = False,
        as_json: AsJson = False) -> None:
    """Write a model as compressed-tensors packs integers. transformers and vLLM read that; embeddings stay dense.

    Calibrates, surveys, plans, encodes, verifies and evaluates.
    """
    from tersor.hf.compress.request import Sampling
    from tersor.hf.grids.run import PackSettings, write_packed

    existing_model(src)
    settings = PackSettings(
        calibration=calibration, calibrated=calibrated, text=text, evaluation_tokens=evaluation_tokens,
        sampling=Sampling(tokens, context=context, seed=seed), context=context, effort=effort or "normal",
        device=device_of(device), resume=resume, dense=None if dense is None else tuple(dense),
        leave_out=tuple(leave_out or ()), head=head, schemes=tuple(schemes.split(",")) if schemes else (),
        asymmetric=asymmetric, whole=whole_model)
    nbytes = None if size is None else parse_size(size)
    if rate is None and nbytes is None and linears is None:
        linears = 4.125
    with Bars() as progress:
        report = write_packed(src, output, rate, size=nbytes, linears=linears, settings=settings, progress=progress)
    summary = dict(report["summary"])
    stay = sum(report["left_dense"].values())
    names = ", ".join(list(report["left_dense"])[:3])
    VOICE.get().say(f"stay dense: {size_text(stay)}, such as {names}" if names else "no matrix stays dense")
    schemes_used = ", ".join(f"{count} {name}" for name, count in summary.pop("schemes").items())
    emit({**summary, "schemes": schemes_used, **report.get("evaluation", {})}, as_json, f"{src} → {output}")
