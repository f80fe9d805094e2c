"""Reduction of models: reduce."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from typing import Annotated, Any

import typer

import tersor
from tersor.cli.base import (
    AsJson,
    CalibrationText,
    EvaluationTokens,
    HeldoutText,
    Out,
    Resume,
    Seed,
    Size,
    Src,
    Tokens,
    emit,
    existing_model,
    out,
)
from tersor.cli.figures import parse_size, size_text
from tersor.cli.telling import Bars
from tersor.errors import CodecConfigError, UnknownCodecError
from tersor.files import exclusive

CONTEST = "rom_auto"
REDUCTIONS = ("svd", "asvd", "rom_released", "rom", "rom_plus", CONTEST)


@exclusive("output")
def reduce(src: Src, output: Out,
           keep: Annotated[float | None, typer.Option(help="share of the linears' parameters",
                                                    show_default="0.8, unless --size is given")] = None,
           size: Size = None,
           method: Annotated[str, typer.Option(help=", ".join(REDUCTIONS))] = "rom_plus",
           allocation: Annotated[str | None, typer.Option(help="uniform, last or water",
                                                         show_default="the method's")] = None,
           storage: Annotated[str | None, typer.Option(help="pair or gauge", show_default="the method's")] = None,
           bias: Annotated[bool | None, typer.Option("--bias/--no-bias", help="centred, with a bias",
                                                    show_default="the method's")] = None,
           factor_codec: Annotated[str | None, typer.Option(help="how factors are stored",
                                                           show_default="the method's")] = None,
           calibration: CalibrationText = None, text: HeldoutText = None, tokens: Tokens = 65536,
           window: Annotated[int, typer.Option(min=2, help="tokens of a calibration window")] = 128,
           evaluation_tokens: EvaluationTokens = 8192,
           context: Annotated[int, typer.Option(min=2, help="tokens of an evaluation window")] = 512,
           seed: Seed = 0, resume: Resume = True, as_json: AsJson = False) -> None:
    """Reduce a model's linears to low rank, and evaluate it. To a share of their parameters, or to a size."""
    from tersor.hf.models.evaluate import evaluate
    from tersor.hf.models.source import open_source
    from tersor.hf.models.text import default_heldout, read_ids
    from tersor.hf.rom.contest import compress_best
    from tersor.hf.rom.run import Reading, reduce_model

    changes = {"allocation": allocation, "storage": storage, "factor_codec": factor_codec, "bias": bias}
    given = {name: value for name, value in changes.items() if value is not None}
    existing_model(src)
    _check(method)
    nbytes, heldout = None if size is None else parse_size(size), text or default_heldout()
    reading = Reading(calibration, max(1, tokens // window), window, seed, resume)
    staging = output.resolve().with_name(f".{output.name}.staged")  # apart from the reduction's own, which goes first
    with contextlib.ExitStack() as ending, Bars() as progress:
        ending.callback(shutil.rmtree, staging, ignore_errors=True)
        source = open_source(src, staging)
        if evaluation_tokens:
            read_ids(source, heldout, context, evaluation_tokens)  # refused before the work, not after it
        if method == CONTEST:
            if nbytes is None or keep is not None or given:
                raise CodecConfigError(f"method '{CONTEST}' compares at equal bytes: give --size, and none of the "
                                       "options of single reductions")
            report = compress_best(src, output, nbytes, reading=reading, progress=progress)
        else:
            report = reduce_model(src, output, keep, _recipe(method, given), size=nbytes, reading=reading,
                                  progress=progress)
        if evaluation_tokens:
            report.update(evaluate(output, source, heldout, context=context, tokens=evaluation_tokens,
                                   progress=progress))
    report.pop("layers", None)  # in the output's own report
    _tell(report.get("contest", {}), as_json=as_json)
    emit(report, as_json, f"{src} → {output}")


def _check(method: str) -> None:
    """Raise a typed error unless the method is a reduction."""
    if method in tersor.families():
        raise CodecConfigError(f"'{method}' is a family of codecs, not a reduction: tersor compress SRC OUT --codec "
                               f"{method}")
    if method not in REDUCTIONS:
        raise UnknownCodecError(method, REDUCTIONS, "reduction")


def _recipe(preset: str, changes: dict[str, Any]) -> Any:
    """Return the preset with what was given in its place; a bias comes with centring."""
    from tersor.hf.rom.recipe import recipe_of

    centred = {"centred": changes["bias"]} if "bias" in changes else {}
    return dataclasses.replace(recipe_of(preset), **changes, **centred)


def _tell(contest: dict[str, Any], *, as_json: bool) -> None:
    """Print how each way did, best first."""
    if not contest or as_json:
        return
    for name, line in sorted(contest.items(), key=lambda item: item[1].get("kl", float("inf"))):
        out.print(f"{name:<24} " + (f"KL {line['kl']:.4g} in {size_text(line['bytes'])}" if "kl" in line
                                    else f"refused: {line['refused']}"))
