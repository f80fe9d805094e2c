"""At equal bytes: reduction alone, quantization alone, and the two together; the least measured KL wins."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tersor.errors import BudgetError
from tersor.files import exclusive, write_json
from tersor.hf.compress.request import Progress, Sampling, no_progress
from tersor.hf.compress.run import compress_model
from tersor.hf.models.evaluate import evaluate
from tersor.hf.models.source import open_source
from tersor.hf.rom.recipe import PRESETS, Recipe
from tersor.hf.rom.run import Reading, reduce_model
from tersor.registry import parse

FACTORS = ("rot,lm8", "rot,lm6", "rot,lm4")  # how factors are coded where reduction and quantization go together
BACKBONES = tuple(f"rot,lm{bits}" for bits in (8, 7, 6, 5, 4, 3, 2))
ROOM = 0.97  # share of the bytes that a backbone may take, the rest being its correction's
RESULT = "tersor-contest.json"


@exclusive("output")
def compress_best(source: str | Path, output: str | Path, size: int, *, reading: Reading | None = None,
                  tokens: int = 4096, progress: Progress = no_progress) -> dict[str, Any]:
    """Compress a model in several ways to the same bytes; keep the one of the least KL on calibration text.

    Parameters
    ----------
    source, output : path
        As for `reduce_model`. `OUT.contest` beside the output holds what is not decided yet; of a killed run, the way
        that was under way goes on, and others start again.
    size : int
        Bytes on disk: shards and manifest.
    tokens : int
        Calibration tokens that the KL is measured on.

    Returns
    -------
    dict
        `won`; `contest`, by name: `kl`, `bytes` and `macs_per_token` (reductions only), or `refused` and why; and the
        winner's report.

    Raises
    ------
    BudgetError
        If none fits.
    """
    target, reads = Path(output).resolve(), reading or Reading()
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another output")
    folder = target.with_name(f"{target.name}.contest")
    opened = open_source(Path(source), folder / "staged")
    found: dict[str, dict[str, Any]] = {}
    reports: dict[str, Mapping[str, Any]] = {}
    for name, run in _contestants(Path(source), size, reads, opened.elements, progress).items():
        place = folder / name
        try:
            shutil.rmtree(place, ignore_errors=True)
            reports[name] = run(place)
        except BudgetError as error:
            found[name] = {"refused": str(error)}
            continue
        scored = evaluate(place, opened, reads.text, context=reads.length, tokens=tokens, progress=progress)
        found[name] = {"kl": scored["kl"], "bytes": scored["bytes"],
                       "macs_per_token": reports[name].get("macs_per_token")}
    scores = {name: line["kl"] for name, line in found.items() if "kl" in line}
    if not scores:
        raise BudgetError(f"{size} bytes are too few for every way: {found}")
    won = min(scores, key=scores.__getitem__)
    write_json(folder / won / RESULT, {"won": won, "contest": found})
    (folder / won).rename(target)
    shutil.rmtree(folder, ignore_errors=True)
    return {**reports[won].get("summary", reports[won]), "won": won, "contest": found}


def _contestants(source: Path, size: int, reads: Reading, elements: int,
                 progress: Progress) -> dict[str, Callable[[Path], Mapping[str, Any]]]:
    """Return every way by name: what writes it to a folder and returns its report."""
    def reduced(recipe: Recipe) -> Callable[[Path], Mapping[str, Any]]:
        return lambda place: reduce_model(source, place, None, recipe, size=size, reading=reads, progress=progress)

    def quantized(place: Path) -> Mapping[str, Any]:
        sampling = Sampling(reads.sequences * reads.length, context=reads.length, seed=reads.seed)
        return compress_model(source, place, size=size, calibration=reads.calibration, sampling=sampling,
                              evaluation_tokens=0, progress=progress)

    plus = PRESETS["rom_plus"]
    ways: dict[str, Callable[[Path], Mapping[str, Any]]] = {"rom": reduced(plus), "quantized": quantized}
    for text in FACTORS:
        ways[f"rom+{text}"] = reduced(dataclasses.replace(plus, factor_codec=text, others=text))
    fitting = [text for text in BACKBONES if parse(text).rate((1024, 1024)) * elements / 8 <= ROOM * size]
    if fitting:
        ways[f"{fitting[0]}+low rank"] = reduced(correction(fitting[0]))
    return ways


def correction(backbone: str) -> Recipe:
    """Return the recipe of a quantized model whose linears' errors are corrected by low rank (QERA)."""
    ridge = PRESETS["rom_plus"].ridge
    return Recipe("anchored", ridge=ridge, factor_codec="rot,lm8", backbone=backbone, others=backbone)


__all__ = ["compress_best", "correction"]
