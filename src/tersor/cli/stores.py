"""Commands on compressed directories of any kind, and on single matrices: encode, inspect, verify, decode."""

from __future__ import annotations

import io
import math
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

import tersor
from tersor import images, store
from tersor.api import as_matrix
from tersor.cli.base import (
    AsJson,
    Bars,
    Calib,
    CodecText,
    Device,
    OptionTexts,
    Rate,
    Seed,
    emit,
    open_source,
    out,
    parse_options,
    read_calibration,
    read_json,
    refuse_existing,
    write_new,
)
from tersor.errors import CodecConfigError, ModelError
from tersor.files import exclusive, locked
from tersor.planning.plan import from_json
from tersor.quality import measure

NPY = b"\x93NUMPY"
# What numpy raises on a damaged header, which it reads as Python text
UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError,
              RecursionError, MemoryError, TokenError)


def encode(src: Annotated[Path, typer.Argument(help="a model directory or .gguf with --plan; or MATRIX.npy")],
           output: Annotated[Path | None, typer.Argument(metavar="OUT")] = None,
           plan_file: Annotated[Path | None, typer.Option("--plan", help="plan.json, for models")] = None,
           calib: Calib = None, rate: Rate = None, codec: CodecText = None, seed: Seed = 0, device: Device = "cpu",
           option: OptionTexts = None, as_json: AsJson = False) -> None:
    """Encode a model by a plan, or a matrix (.npy) by a codec string or a family at a rate."""
    target = output or src.with_suffix(".tersor")
    refuse_existing(target)
    with locked(target):
        if src.suffix == ".npy":
            if plan_file is not None or calib is not None or device != "cpu":
                raise CodecConfigError("--plan, --calib and --device are for models; a matrix takes --codec, --rate "
                                       "and --option")
            record = _encode_matrix(src, target, rate, "auto" if codec is None else codec, seed, parse_options(option))
        else:
            if plan_file is None or rate is not None or codec is not None:
                raise ModelError("encoding a model takes --plan, and no --rate or --codec; make a plan with "
                                 "'tersor plan', or use 'tersor compress'")
            record = _encode_model(src, target, plan_file, calib, seed, device, parse_options(option))
    emit(record, as_json, str(target))


def _encode_model(src: Path, target: Path, plan_file: Path, calib: Path | None, seed: int, device: str,
                  options: dict[str, Any]) -> dict[str, Any]:
    from tersor.hf.compress import encode as stage
    from tersor.hf.compress.request import Request, check_device, provenance
    from tersor.hf.compress.run import conclude
    from tersor.hf.compress.work import WorkFolder

    check_device(device)
    picks = from_json(read_json(plan_file))
    work = WorkFolder(target).claim()
    source, calibration = open_source(src, target), read_calibration(calib)
    request = Request(source.nbytes, "plan", seed, options)
    record = provenance(source, calibration, request, tersor.__version__)
    job = stage.Job(source, picks, calibration, request, record)
    with Bars() as progress:
        matrices = stage.run(job, work, device=device, progress=progress)
    summary = conclude(job, matrices, work, {})["summary"]
    work.finish("matrices", "staged")
    return summary


def open_npy(path: Path) -> np.ndarray:
    """Return the array in a .npy file, mapped copy-on-write: read page by page as it is used, and never whole.

    (A map in mode "r" would be copied whole: torch takes writeable arrays only.)

    Raises
    ------
    CodecConfigError
        If it is no .npy file of plain numbers.
    """
    try:
        with path.open("rb") as handle:
            if handle.read(len(NPY)) != NPY:
                raise CodecConfigError(f"{path}: expected a .npy file of one float matrix, found other bytes; write it "
                                       "with numpy.save")
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except UNREADABLE as error:
        if isinstance(error, CodecConfigError):
            raise
        raise CodecConfigError(f"{path}: expected a .npy file of one float matrix: {error}") from error


def _encode_matrix(src: Path, target: Path, rate: float | None, codec: str, seed: int,
                   options: dict[str, Any]) -> dict[str, Any]:
    matrix = as_matrix(open_npy(src))
    encoded = tersor.compress(matrix, rate, codec, seed, **options)
    tersor.save(target, encoded)
    quality = measure(matrix, encoded)
    return {"codec": str(encoded.codec), "shape": str(encoded.shape), "bytes": encoded.nbytes, "rate": encoded.rate,
            "relative_error": quality.relative_error, "frobenius_error": math.sqrt(quality.relative_error),
            "sqnr_db": quality.sqnr, "shannon_gap_db": quality.shannon_gap,
            "bytes_on_disk": store.stored_nbytes(target)}


def inspect(path: Annotated[Path, typer.Argument(metavar="OUT")], as_json: AsJson = False) -> None:
    """Show what a compressed directory holds: codecs, shapes, bytes."""
    opened = store.read(path)
    rows = [{"name": name, "shape": list(e.shape), "codec": "plain" if e.codec is None else str(e.codec),
             "bytes": e.nbytes, "rate": 8 * e.nbytes / max(1, torch.Size(e.shape).numel())}
            for name, e in opened.entries.items()]
    nbytes, elements = store.stored_nbytes(path), store.params(opened)
    record = {"kind": opened.kind, "bytes": nbytes, "parameters": elements, "rate": 8 * nbytes / elements,
              "format_version": opened.manifest["format_version"], "provenance": opened.manifest["provenance"],
              "entries": rows}
    if not as_json:
        table = Table("name", "shape", "codec", "bytes", "bits/element")
        for row in rows:
            table.add_row(row["name"], "x".join(map(str, row["shape"])), row["codec"], str(row["bytes"]),
                          f"{row['rate']:.3f}")
        out.print(table)
    emit(record, as_json, str(path))


def verify(path: Annotated[Path, typer.Argument(metavar="OUT")],
           against: Annotated[Path | None, typer.Option(help="the original: errors are measured again")] = None,
           as_json: AsJson = False) -> None:
    """Verify digests, layouts, coverage and errors; exit status 3 if anything is wrong."""
    from tersor.hf.compress.verify import verify as run_verification

    with Bars() as progress:
        record = run_verification(path, None if against is None else open_source(against, path), progress)
    emit(record, as_json, f"verified: {path}")


@exclusive("to")
def decode(path: Annotated[Path, typer.Argument(metavar="OUT")],
           to: Annotated[Path, typer.Option(help="a directory for a model, a .npy for a matrix, a .png for an image")],
           as_json: AsJson = False) -> None:
    """Write the dense model, matrix or image that a compressed directory stands for."""
    refuse_existing(to)
    opened = store.read(path)
    if opened.kind == "matrix":
        decoded = opened.matrix(opened.matrix_names()[0]).decode().numpy()
        write_new(to, lambda handle: np.save(handle, decoded))
    elif opened.kind == "model":
        from tersor.hf.models.dense import write_dense

        write_dense(opened, to)
    elif images.is_image(opened):
        encoded = images.load(path)
        if to.suffix not in (".png", ".npy"):
            raise CodecConfigError(f"{to}: an image becomes a .png or a .npy")
        content = images.to_png(encoded.image()) if to.suffix == ".png" else _npy(images.decode(encoded))
        write_new(to, lambda handle: handle.write(content))
    else:
        raise CodecConfigError(f"{path}: holds several matrices; load them with tersor.load")
    emit({"decoded": str(to), "matrices": len(opened.matrix_names())}, as_json, "decode")


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()
