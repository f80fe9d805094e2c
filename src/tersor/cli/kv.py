"""Commands on KV caches: kv-plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.base import (
    AsJson,
    CalibrationText,
    Device,
    Seed,
    Src,
    emit,
    open_source,
    read_json,
)
from tersor.cli.telling import Bars
from tersor.errors import CodecConfigError
from tersor.files import exclusive


def read_ladder(path: Path) -> tuple[str, ...]:
    """Read a ladder file: a JSON array of codec strings."""
    ladder = read_json(path)
    if not isinstance(ladder, list) or not ladder or not all(isinstance(spec, str) for spec in ladder):
        raise CodecConfigError(f"{path}: expected a JSON array of codec strings")
    return tuple(ladder)


@exclusive("output")
def kv_plan(src: Src, output: Annotated[Path, typer.Argument(metavar="PLAN", help="kv.json to write or resume")],
            rate: Annotated[float, typer.Option(help="bits per element of the encoded tokens")] = 2.5,
            text: CalibrationText = None,
            codec: Annotated[str, typer.Option(help="codecs to choose from: klt, trellis, or all")] = "klt",
            effort: Annotated[str, typer.Option(help="of encoding trellis codes: fast, normal or best")] = "normal",
            ladder: Annotated[Path | None, typer.Option(help="JSON array of codec strings to choose from",
                                                      show_default="what --codec says")] = None,
            context: Annotated[int, typer.Option(min=2, help="tokens of a window, 3/4 of them the prompt")] = 1024,
            windows: Annotated[int, typer.Option(min=1, help="windows measured")] = 2,
            training: Annotated[int, typer.Option(min=0, help="further windows, which train tables")] = 8,
            reach: Annotated[int | None, typer.Option(min=1, help="positions that the plan is for",
                                                      show_default="all of the model's")] = None,
            residual: Annotated[int, typer.Option(min=0, help="recent tokens that stay dense")] = 128,
            sink: Annotated[int, typer.Option(min=0, help="first tokens that stay dense")] = 4,
            block: Annotated[int, typer.Option(min=1, help="tokens encoded at a time")] = 64,
            seed: Seed = 0, device: Device = "cpu", as_json: AsJson = False) -> None:
    """Choose codecs for a KV cache by measured KL. Keys and values of every layer have their own."""
    from tersor.hf.kv import ladders
    from tersor.hf.kv.plan import FORMAT, PlanSettings, plan_cache
    from tersor.hf.models.text import default_calibration

    if output.exists() and FORMAT not in json.dumps(read_json(output)):
        raise FileExistsError(f"{output} exists, and is no KV plan; remove it or name another output")
    rungs = ladders.ladder(codec, effort) if ladder is None else read_ladder(ladder)
    settings = PlanSettings(rungs, context, windows, training, residual, sink, block, seed, reach)
    with Bars() as progress:
        record = plan_cache(open_source(src, output), text or default_calibration(), rate, output, settings,
                            device=device, progress=progress)
    emit({**record["measured"], "file": str(output)}, as_json, f"KV plan: {src}")
