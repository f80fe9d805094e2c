"""`tersor compress --method rom`: models reduced to a share of their linears' parameters."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from tersor.cli.base import Bars, emit, out, parse_size
from tersor.errors import CodecConfigError

CONTEST = "rom_auto"
REDUCTIONS = ("svd", "asvd", "rom_released", "rom", "rom_plus", CONTEST)
LENGTH = 128  # tokens in a window unless told otherwise: 512 x 128, as published


@dataclasses.dataclass(frozen=True)
class Given:
    """What the command line says of a reduction; None leaves the preset as it is."""

    keep: float | None = None
    size: str | None = None
    allocation: str | None = None
    storage: str | None = None
    bias: bool | None = None
    factor_codec: str | None = None

    def recipe(self, preset: str) -> Any:
        """Return the preset with what was given in its place."""
        from tersor.hf.rom.recipe import recipe_of

        changes: dict[str, Any] = {name: value for name in ("allocation", "storage", "factor_codec")
                                   if (value := getattr(self, name)) is not None}
        if self.bias is not None:
            changes.update(bias=self.bias, centred=self.bias)
        return dataclasses.replace(recipe_of(preset), **changes)


    def contest(self) -> int:
        """Return the bytes that a contest is held at.

        Raises
        ------
        CodecConfigError
            Unless a size, and nothing else, was given.
        """
        others = [name for name, value in dataclasses.asdict(self).items() if value is not None and name != "size"]
        if self.size is None or others:
            raise CodecConfigError(f"method '{CONTEST}' compares at equal bytes: give --size, and none of the options "
                                   "of single reductions")
        return parse_size(self.size)


def _tell(contest: dict[str, Any], *, as_json: bool) -> None:
    """Print how each way did, best first."""
    if not contest or as_json:
        return
    for name, line in sorted(contest.items(), key=lambda item: item[1].get("kl", float("inf"))):
        out.print(f"{name:<24} " + (f"KL {line['kl']:.5f} in {line['bytes']} bytes" if "kl" in line
                                    else f"refused: {line['refused']}"))


def check_unused(method: str, given: Given) -> None:
    """Raise `CodecConfigError` if options of reductions were given with another method."""
    named = [f"--{name.replace('_', '-')}" for name, value in dataclasses.asdict(given).items()
             if value is not None and name != "size"]
    if named:
        raise CodecConfigError(f"{', '.join(named)}: only with the methods {', '.join(REDUCTIONS)}, not '{method}'")


def refuse(rate: float | None, device: str, *, calibrated: bool, dry_run: bool, others: bool) -> None:
    """Raise `CodecConfigError` for options that reductions do not have."""
    wrong = {"--rate (use --keep or --size)": rate is not None, "--device": device != "cpu",
             "--uncalibrated": not calibrated, "--dry-run": dry_run, "--option or --sensitivities": others}
    named = [name for name, is_given in wrong.items() if is_given]
    if named:
        raise CodecConfigError(f"reductions ({', '.join(REDUCTIONS)}) know nothing of {', '.join(named)}")


def reduce(src: Path, output: Path, method: str, given: Given, *, calibration: Path | None, text: Path | None,
           tokens: int, length: int, evaluation_tokens: int, context: int, seed: int, resume: bool,
           as_json: bool) -> None:
    """Reduce a model, evaluate it, and print what came of it."""
    from tersor.hf.models.evaluate import evaluate
    from tersor.hf.models.source import open_source
    from tersor.hf.models.text import default_heldout
    from tersor.hf.rom.contest import compress_best
    from tersor.hf.rom.run import Reading, reduce_model

    size = None if given.size is None else parse_size(given.size)
    reading = Reading(calibration, max(1, tokens // length), length, seed, resume)
    with Bars() as progress:
        if method == CONTEST:
            report = compress_best(src, output, given.contest(), reading=reading, progress=progress)
        else:
            report = reduce_model(src, output, given.keep, given.recipe(method), size=size, reading=reading,
                                  progress=progress)
        if evaluation_tokens:
            source = open_source(src, output.with_name(f"{output.name}.staged"))
            report.update(evaluate(output, source, text or default_heldout(), context=context, tokens=evaluation_tokens,
                                   progress=progress))
    shutil.rmtree(output.with_name(f"{output.name}.staged"), ignore_errors=True)
    report.pop("layers", None)  # in the output's own report
    _tell(report.get("contest", {}), as_json=as_json)
    emit(report, as_json, f"{src} → {output}")
