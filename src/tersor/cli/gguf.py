"""The command that writes GGUF files, for llama.cpp and what is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.base import (
    SIZE,
    AsJson,
    Calib,
    CalibrationText,
    Context,
    Effort,
    EvaluationTokens,
    HeldoutText,
    Resume,
    Seed,
    Src,
    Tokens,
    emit,
    existing_model,
)
from tersor.cli.figures import parse_size
from tersor.cli.telling import VOICE, Bars

GGUF_RATE = "bits a weight over all weights, the whole file counted"



def gguf(src: Src, output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="file to write; must not exist")],
         rate: Annotated[float | None, typer.Option(help=GGUF_RATE, show_default="4.5, unless --size is given")] = None,
         size: Annotated[str | None, typer.Option(help=SIZE)] = None, calibration: CalibrationText = None,
         moments: Calib = None,
         calibrated: Annotated[bool, typer.Option("--calibrated/--uncalibrated",
                                                  help="weigh errors by what text shows of the inputs")] = True,
         text: HeldoutText = None, tokens: Tokens = 65536, evaluation_tokens: EvaluationTokens = 8192,
         context: Context = 512, effort: Effort = None, seed: Seed = 0,
         dense: Annotated[list[str] | None, typer.Option("--dense", metavar="PATTERN",
                                                         help="leave the tensors that this shell pattern matches, as "
                                                              "llama.cpp names them, as they are; repeatable")] = None,
         types: Annotated[str | None, typer.Option(metavar="NAMES", help="types that tensors may have, such as "
                                                   "Q3_K,Q4_K,Q6_K", show_default="all")] = None,
         requantize: Annotated[bool, typer.Option("--requantize", help="take a file that is quantized already; errors "
                                                                       "add up")] = False,
         resume: Resume = True, as_json: AsJson = False) -> None:
    """Write a model as one GGUF file of a given size. Calibrates, surveys, plans, encodes, verifies and evaluates."""
    from tersor.hf.compress.request import Sampling
    from tersor.hf.gguf.run import GgufSettings, write_gguf

    existing_model(src)
    settings = GgufSettings(calibration=calibration, calibrated=calibrated, moments=moments, text=text,
                            sampling=Sampling(tokens, context=context, seed=seed), evaluation_tokens=evaluation_tokens,
                            context=context, effort=effort or "normal", resume=resume, requantize=requantize,
                            dense=tuple(dense or ()), types=tuple(types.split(",")) if types else ())
    nbytes = None if size is None else parse_size(size)
    with Bars() as progress:
        report = write_gguf(src, output, 4.5 if rate is None and nbytes is None else rate, size=nbytes,
                            settings=settings, progress=progress)
    for width, line in report["widths"].items():
        one = line["tensors"] == 1
        takes = f"no type but {', '.join(line['types'])}" if line["types"] else (
            f"no type, and stay{'s as it is' if one else ' as they are'}")
        VOICE.get().say(f"{line['tensors']} matri{'x' if one else 'ces'} with rows of {width} weights, such as "
                        f"'{line['such_as']}', take{'s' if one else ''} {takes}")
    summary = dict(report["summary"])
    types = ", ".join(f"{count} {name}" for name, count in summary.pop("types").items())
    VOICE.get().say(f"types of the matrices: {types}")
    emit({**summary, "types": types, **report.get("evaluation", {}), "report": f"{output}.report.json"}, as_json,
         f"{src} → {output}")
