"""The command on images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from tersor import images
from tersor.cli.base import (
    AsJson,
    Codec,
    OptionTexts,
    Out,
    Seed,
    Size,
    emit,
    parse_options,
    refuse_existing,
    write_new,
)
from tersor.cli.figures import parse_size
from tersor.cli.funnel import existing
from tersor.cli.report import image_html
from tersor.cli.telling import VOICE
from tersor.files import exclusive


@exclusive("output")
def image(src: Annotated[Path, typer.Argument(metavar="PNG", help="gray or colour, with or without alpha")],
          output: Out,
          rate: Annotated[float | None, typer.Option(help="bits per sample, everything stored counted",
                                                    show_default="2 for a family, unless --size is given")] = None,
          size: Size = None,
          codec: Codec = images.DEFAULT,
          channels: Annotated[str, typer.Option(help=", ".join(images.LAYOUTS))] = "patches",
          seed: Seed = 0, option: OptionTexts = None, as_json: AsJson = False) -> None:
    """Encode a PNG, compare it with the original, report. Back: `tersor decode OUT --to back.png`."""
    page = output.with_name(f"{output.name}.report.html")
    refuse_existing(output)
    refuse_existing(page)
    nbytes = None if size is None else parse_size(size)
    original = images.read(existing(src, "a PNG"))
    if original.converted:
        VOICE.get().say(f"{src}: {original.converted}")
    unread = dataclasses.replace(original, png_bytes=None)  # what there is to say of the PNG is said below, once
    encoded = images.encode(unread, rate, codec, size=nbytes, channels=channels, seed=seed, **parse_options(option))
    on_disk = encoded.save(output)
    decoded = images.load(output).image()
    height, width = original.samples.shape[:2]
    record = {"mode": original.mode, "width": width, "height": height, "bits": original.bits, "channels": channels,
              "codec": " ".join(dict.fromkeys(str(e.codec) for e in encoded.matrices.values())) or "constant",
              "bytes": on_disk, "rate": 8 * on_disk / original.samples.size,
              "bits_per_pixel": 8 * on_disk / (height * width), **images.compare(original, decoded),
              "png_bytes": src.stat().st_size, "report": str(page)}
    if original.converted:
        record["converted"] = original.converted
    told = images.remark(original, on_disk)
    if told:
        VOICE.get().say(f"{src}: {told}")
        record["remark"] = told
    content = image_html(record, images.pictures(original, decoded)).encode()
    write_new(page, lambda handle: handle.write(content))
    emit(record, as_json, f"{src} → {output}")
