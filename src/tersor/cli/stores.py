"""Commands on compressed directories of any kind, and on single matrices: encode, inspect, verify, decode."""

from __future__ import annotations

import io
import math
import re
import tempfile
import tokenize
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from rich.text import Text

import tersor
from tersor import images, store
from tersor.api import as_matrix
from tersor.cli.base import (
    CODEC,
    FILES,
    RATE,
    AsJson,
    Calib,
    Context,
    Dense,
    Device,
    Devices,
    Effort,
    LeaveOut,
    OptionTexts,
    Seed,
    Tokens,
    Whole,
    device_of,
    directory,
    emit,
    one_of,
    open_source,
    parse_options,
    read_calibration,
    read_json,
    refuse_existing,
    show,
    write_new,
)
from tersor.cli.figures import count_text, size_text
from tersor.cli.formats import GGUF, OWN, format_of
from tersor.cli.funnel import existing
from tersor.cli.telling import Bars
from tersor.contract.derived import package_nbytes
from tersor.errors import CodecConfigError, CorruptStoreError, ModelError, TersorError
from tersor.families import families
from tersor.files import exclusive, locked
from tersor.planning.plan import from_json
from tersor.quality import measure
from tersor.registry import from_config


def encode(src: Annotated[Path, typer.Argument(metavar="SRC",
                                             help="a model directory or .gguf with --plan; or MATRIX.npy")],
           output: Annotated[Path | None, typer.Argument(metavar="OUT", show_default="SRC with .tersor",
                                                         callback=directory,
                                                         help="output directory; must not exist")] = None,
           plan_file: Annotated[Path | None, typer.Option("--plan", help="plan.json, for models")] = None,
           calib: Calib = None,
           rate: Annotated[float | None, typer.Option(help=f"{RATE}; for matrices",
                                                      show_default="3 for a family")] = None,
           codec: Annotated[str | None, typer.Option(help=f"{CODEC}; for matrices", show_default="auto",
                                                     autocompletion=families)] = None,
           calibration_text: Annotated[Path | None, typer.Option(
               help="text to calibrate each block on, behind those that are encoded; for models")] = None,
           tokens: Tokens = 65536, context: Context = 512, whole_model: Whole = False,
           effort: Effort = None, seed: Seed = 0, device: Device = "cpu", option: OptionTexts = None,
           dense: Dense = None, leave_out: LeaveOut = None, as_json: AsJson = False) -> None:
    """Encode a model by a plan, or one .npy by a codec."""
    expected = "a matrix as .npy, a transformers model directory or a .gguf file"
    existing(src, expected)
    beside = src.resolve()
    name = beside.stem if beside.suffix in (".npy", ".gguf") else beside.name
    target = output or src.parent / f"{name}.tersor"
    refuse_existing(target)
    with locked(target):
        if src.suffix == ".npy":
            if plan_file is not None or calib is not None or calibration_text is not None or device != "cpu":
                raise CodecConfigError("--plan, --calibration, --calibration-text and --device are for models; a "
                                       "matrix takes --codec, --rate and --option")
            record = _encode_matrix(src, target, rate, codec or "auto", seed,
                                    {**parse_options(option), "effort": effort})
        elif src.is_file() and src.suffix != ".gguf":
            raise CodecConfigError(f"{src}: expected {expected}, found a {src.suffix or 'nameless'} file")
        else:
            if plan_file is None or rate is not None or codec is not None or effort is not None:
                raise ModelError("encoding a model takes --plan, and no --rate, --codec or --effort; make a plan with "
                                 "'tersor plan', or use 'tersor compress'")
            if calib is not None and calibration_text is not None:
                raise ModelError("--calibration and --calibration-text: expected one of them")
            picks, source = from_json(read_json(plan_file)), open_source(src, target, dense, leave_out)
            text = None if calibration_text is None else (existing(calibration_text, "a UTF-8 text file"), tokens,
                                                          context, whole_model)
            record = _encode_model(source, target, picks, read_calibration(calib) or text, seed, device_of(device),
                                   parse_options(option))
    emit(record, as_json, f"{src} → {target}")


def _encode_model(source: Any, target: Path, picks: dict[str, Any], calibration: Any, seed: int, device: str,
                  options: dict[str, Any]) -> dict[str, Any]:
    from tersor.hf.compress import encode as stage
    from tersor.hf.compress.reading import Reading
    from tersor.hf.compress.request import Request, Sampling, provenance
    from tersor.hf.compress.run import conclude
    from tersor.hf.compress.work import WorkFolder

    work, reading = WorkFolder(target).claim(), None
    request = Request(source.nbytes, "plan", seed, options)
    if isinstance(calibration, tuple):
        text, tokens, context, whole = calibration
        reading = Reading.of(source, text, Sampling(tokens, context=context), work / "activations", devices=(device,),
                             whole=whole)
        calibration = reading.seen
    record = provenance(source, calibration, request, tersor.__version__)
    job = stage.Job(source, picks, calibration, request, record)
    with Bars() as progress:
        matrices = stage.run(job, work, device=device, reading=reading, progress=progress)
    summary = conclude(job, matrices, work, {}, devices=(device,))["summary"]
    work.finish("matrices", "staged", "activations", "survey.jsonl.outside")
    return summary


def open_npy(path: Path) -> np.ndarray:
    """Return the array in a .npy file, mapped copy-on-write: read page by page as it is used, and never whole.

    (A map in mode "r" would be copied whole: torch takes writeable arrays only.)

    Raises
    ------
    CodecConfigError
        If it is no .npy file of plain numbers.
    """
    existing(path, "a .npy file of one float matrix")
    try:
        with warnings.catch_warnings():  # numpy's, on headers of old versions
            warnings.simplefilter("ignore")
            return np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, SyntaxError, EOFError,
            MemoryError, RecursionError, tokenize.TokenError) as error:  # numpy reads headers as Python
        raise CodecConfigError(f"{path}: expected a .npy file of one float matrix: {type(error).__name__}: "
                               f"{' '.join(str(error).split())[:200]}") from error


def _encode_matrix(src: Path, target: Path, rate: float | None, codec: str, seed: int,
                   options: dict[str, Any]) -> dict[str, Any]:
    matrix = as_matrix(open_npy(src))
    encoded = tersor.compress(matrix, rate, codec, seed, **options)
    tersor.save(target, encoded)
    quality = measure(matrix, encoded)
    return {"codec": str(encoded.codec), "shape": str(encoded.shape), "bytes": encoded.nbytes,
            "bytes_original": matrix.numel() * matrix.element_size(), "rate": encoded.rate,
            "relative_error": quality.relative_error, "frobenius_error": math.sqrt(quality.relative_error),
            "sqnr_db": quality.sqnr, "shannon_gap_db": quality.shannon_gap,
            "bytes_on_disk": store.stored_nbytes(target)}


def inspect(path: Annotated[Path, typer.Argument(metavar="OUT", help="what Tersor has written")],
            as_json: AsJson = False) -> None:
    """Show codecs, shapes and bytes, and their totals."""
    opened = store.read(existing(path, "a directory written by tersor"))
    coded = _cache_codecs(opened)
    rows = [{"name": name, "shape": list(e.shape),
             "codec": coded.get(name, "plain") if e.codec is None else str(e.codec),
             "bytes": e.nbytes, "rate": 8 * e.nbytes / max(1, torch.Size(e.shape).numel())}
            for name, e in opened.entries.items()]
    kinds = totals(rows)
    nbytes, elements = store.stored_nbytes(path), store.params(opened)
    record = {"kind": opened.kind, "bytes": nbytes, "parameters": elements, "rate": 8 * nbytes / max(1, elements),
              "format_version": opened.manifest["format_version"], "provenance": opened.manifest["provenance"],
              "kinds": kinds, "entries": rows}
    record["package_bytes"] = package_nbytes(e.codec for e in opened.entries.values() if e.codec is not None)
    if opened.kind == "cache":  # elements of a cache's entries are bytes of codes, not numbers that they stand for
        for key in ("parameters", "rate"):
            record.pop(key)
    if not as_json:
        show(_table(["name", "shape", "codec", "size", "bits/element"], [
            [row["name"], "x".join(map(str, row["shape"])), row["codec"], size_text(row["bytes"]),
             f"{row['rate']:.3f}"] for row in rows]))
        show(_table(["kind", "number", "elements", "codecs", "size", "bits/element"], [
            [kind["kind"], str(kind["count"]), count_text(kind["elements"]), ", ".join(kind["codecs"]),
             size_text(kind["bytes"]), f"{kind['rate']:.3f}"] for kind in kinds]))
    emit(record, as_json, str(path))


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sums of rows whose names differ in numbers only: the same matrix of every layer, say."""
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = re.sub(r"\d+", "*", row["name"])
        kind = kinds.setdefault(name, {"kind": name, "count": 0, "elements": 0, "bytes": 0, "codecs": []})
        kind["count"] += 1
        kind["elements"] += torch.Size(row["shape"]).numel()
        kind["bytes"] += row["bytes"]
        kind["codecs"] = list(dict.fromkeys([*kind["codecs"], row["codec"]]))
    return [{**kind, "rate": 8 * kind["bytes"] / max(1, kind["elements"])} for kind in kinds.values()]


def _table(heads: list[str], rows: list[list[str]]) -> Table:
    table = Table(*heads)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _cache_codecs(opened: store.Store) -> Mapping[str, str]:
    """Return the codecs of a KV cache's streams by the names of their tensors."""
    try:
        return {stored: str(from_config(layer["meta"][tensor.split("/")[1]]["codec"]))
                for layer in opened.manifest["provenance"].get("kv_cache", {}).get("layers", ()) if layer is not None
                for tensor, stored in layer["tensors"].items() if tensor.startswith("stream/")}
    except TersorError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CorruptStoreError(f"{opened.path}: unsound record of a cache: {error!r}") from error


def verify(path: Annotated[Path, typer.Argument(metavar="OUT", help="what Tersor has written")],
           against: Annotated[Path | None, typer.Option(
               help="the original model, .npy or .png: errors are measured again")] = None,
           device: Device = "cpu", devices: Devices = None, as_json: AsJson = False) -> None:
    """Verify digests, layouts, coverage and errors. The exit status is 3 if anything is wrong."""
    from tersor.hf.compress.request import usable_devices
    from tersor.hf.compress.verify import verify as run_verification

    existing(path, "what tersor has written")
    kind = format_of(path)
    one_of(device, devices)
    if kind != OWN:
        if devices is not None or device != "cpu":
            raise CodecConfigError(f"{path}: --device and --devices are for what tersor compress writes")
        emit(_verify_other(path, kind, against), as_json, f"verified: {path}")
        return
    opened = store.read(path)
    places = (device_of(device),) if devices is None else usable_devices(devices)
    with Bars() as progress:
        if against is None or opened.kind == "model":
            record = run_verification(path, None if against is None else open_source(against, path), progress,
                                      devices=places)
        else:
            found = _against(opened, against)
            record = {**run_verification(path, None, progress), "against": str(against), **found}
    emit(record, as_json, f"verified: {path}")


def _verify_other(path: Path, kind: str, against: Path | None) -> dict[str, Any]:
    """Verify what `tersor gguf` or `tersor compressed-tensors` has written."""
    from tersor.hf.gguf.verify import verify_file
    from tersor.hf.grids.verify import verify as verify_packed

    with Bars() as progress, tempfile.TemporaryDirectory() as staged:
        if kind == GGUF:
            return verify_file(path, None if against is None else existing(against, "the original"), Path(staged),
                               progress)
        return verify_packed(path, None if against is None else open_source(against, path), progress)


def _against(opened: store.Store, original: Path) -> dict[str, float]:
    """Return how far a matrix or an image is from its original."""
    existing(original, "the original")
    if images.is_image(opened):
        return images.compare(images.read(original), images.load(opened.path).image())
    if opened.kind != "matrix":
        raise CodecConfigError(f"{opened.path}: holds {_held(opened)}; --against is for a model, one matrix or "
                               "an image")
    matrix, encoded = as_matrix(open_npy(original)), opened.matrix(opened.matrix_names()[0])
    if tuple(matrix.shape) != encoded.shape:
        raise CodecConfigError(f"{original}: expected the original of {opened.path}, {encoded.shape}, found "
                               f"{tuple(matrix.shape)}")
    quality = measure(matrix, encoded)
    return {"relative_error": quality.relative_error, "sqnr_db": quality.sqnr}


def _held(opened: store.Store) -> str:
    """Return what a store holds, in words."""
    words = {"matrix": "one matrix", "model": "a model", "cache": "a KV cache"}
    return "an image" if images.is_image(opened) else words.get(opened.kind, "several matrices")


@exclusive("to")
def decode(path: Annotated[Path, typer.Argument(metavar="OUT", help="what Tersor has written")],
           to: Annotated[Path, typer.Option(help="a new directory for a model, a .npy for a matrix, a .png or .npy for "
                                                 "an image")],
           as_json: AsJson = False) -> None:
    """Write the dense model, matrix or image again."""
    refuse_existing(to)
    opened = store.read(existing(path, "a directory written by tersor"))
    if images.is_image(opened):
        _check_target(to, opened, to.suffix in (".png", ".npy"), "the name of a .png or a .npy")
        encoded = images.load(path)
        content = images.to_png(encoded.image()) if to.suffix == ".png" else _npy(images.decode(encoded))
        write_new(to, lambda handle: handle.write(content))
    elif opened.kind == "matrix":
        _check_target(to, opened, to.suffix == ".npy", "the name of a .npy")
        loaded = tersor.load(path)
        assert isinstance(loaded, tersor.Encoded), "a store of kind matrix"
        decoded = loaded.decode()
        array = (decoded.float() if decoded.dtype == torch.bfloat16 else decoded).numpy()  # NumPy has no bfloat16
        write_new(to, lambda handle: np.save(handle, array))
    elif opened.kind == "model":
        from tersor.hf.models.dense import write_dense

        _check_target(to, opened, to.suffix.lower() not in FILES, "the name of a new directory")
        write_dense(opened, to)
    elif opened.kind == "cache":
        raise CodecConfigError(f"{path}: holds a KV cache, which only its model can read; use CompressedCache.load")
    else:
        raise CodecConfigError(f"{path}: holds several matrices; load them with tersor.load")
    emit({"decoded": str(to), "matrices": len(opened.matrix_names())}, as_json, "decode")


def _check_target(to: Path, opened: store.Store, sound: bool, expected: str) -> None:
    if not sound:
        raise CodecConfigError(f"--to: {opened.path} holds {_held(opened)}, so expected {expected}, found '{to}'")


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()
