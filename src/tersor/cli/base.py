"""What the commands share: option types, printing and new files."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tersor import files
from tersor.cli.figures import readable
from tersor.cli.funnel import existing
from tersor.cli.telling import VOICE
from tersor.errors import CodecConfigError
from tersor.families import EFFORTS, families
from tersor.files import whole
from tersor.planning.calibration import Calibration

out = Console()
WIDE = 10_000  # columns where nobody looks: whole names, however long
FILES = (".npy", ".npz", ".png", ".pt", ".pth", ".bin", ".safetensors", ".gguf", ".json", ".zip", ".jpg", ".jpeg")
MOST_SEED = 2**63 - 1

Src = Annotated[Path, typer.Argument(metavar="SRC", help="a transformers model directory, or a .gguf file")]


def directory(path: Path | None) -> Path | None:
    """Return the path of a directory to be written, unless it has the name of a file.

    Raises
    ------
    CodecConfigError
        If it has.
    """
    if path is not None and path.suffix.lower() in FILES:
        raise CodecConfigError(f"OUT: expected the name of a new directory, found '{path}'")
    return path


Out = Annotated[Path, typer.Argument(metavar="OUT", callback=directory, help="output directory; must not exist")]


def _text(path: Path | None) -> Path | None:
    return None if path is None else existing(path, "a UTF-8 text file")


RATE = "bits per element, everything stored counted"
SIZE = "size on disk: 5MB, 900kB, 2GiB (1 MB = 10^6 bytes, 1 MiB = 2^20 bytes)"
Rate = Annotated[float | None, typer.Option(help=RATE)]
BudgetRate = Annotated[float | None, typer.Option(help=RATE, show_default="3, unless --size is given")]
Size = Annotated[str | None, typer.Option(help=SIZE)]
CODEC = "a family (see `tersor families`), or a codec string such as rot,lm3 or rtn4g64"
Codec = Annotated[str, typer.Option("--codec", help=CODEC, autocompletion=families)]
Calib = Annotated[Path | None, typer.Option("--calibration", help="file written by `tersor calibrate`")]
CalibrationText = Annotated[Path | None, typer.Option("--calibration-text", help="text to calibrate on",
                                                      show_default="packaged", callback=_text)]
HeldoutText = Annotated[Path | None, typer.Option("--text", help="held-out text to evaluate on",
                                                  show_default="packaged", callback=_text)]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object, with exact numbers")]
Effort = Annotated[str | None, typer.Option(help=f"the encoder's work: {', '.join(EFFORTS)}; for families that read it",
                                            show_default="normal, where it is read",
                                            autocompletion=lambda: EFFORTS)]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="seed of the encoder's search")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU if there is one")]
Devices = Annotated[str | None, typer.Option(help="several devices: 2 (GPUs), cuda:0,cuda:1 or cpu,cpu; with "
                                                  "the bytes of one", show_default="one")]
Engine = Annotated[str | None, typer.Option(metavar="ray[:ADDRESS]", show_default="threads, one a device",
                                            help="workers of a Ray cluster: as many as devices, or those at ADDRESS")]
Whole = Annotated[bool, typer.Option("--whole-model", help="keep the whole model in memory, not a block at a time")]
OptionTexts = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE",
                                                       help="encoder option; repeatable")]
Sensitivities = Annotated[Path | None, typer.Option(help="JSON: matrix name to weight of its relative distortion",
                                                    show_default="from the calibration")]
Dense = Annotated[list[str] | None, typer.Option(
    "--dense", metavar="PATTERN", help="leave the parameters that this shell pattern matches as they are; repeatable; "
    "'' for none", show_default="what text does not reach, such as a vision tower")]
LeaveOut = Annotated[list[str] | None, typer.Option(
    "--leave-out", metavar="PATTERN", help="leave out tensors that no parameter takes, which are carried along "
    "otherwise; repeatable")]
Tokens = Annotated[int, typer.Option(min=1, help="calibration tokens")]
EvaluationTokens = Annotated[int, typer.Option(min=0, help="evaluation tokens; 0: none")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="go on with what a killed run has finished")]
Context = Annotated[int, typer.Option(min=2, help="window length in tokens")]


def one_of(device: str, devices: str | None) -> None:
    """Raise `CodecConfigError` if one device is named, and several."""
    if devices is not None and device != "cpu":
        raise CodecConfigError("--device and --devices: expected one of them")


def device_of(text: str) -> str:
    """Return the device that is meant; which one `auto` has found is told.

    Raises
    ------
    ModelError
        If torch cannot use it.
    """
    from tersor.hf.compress.request import usable_device

    found = usable_device(text)
    if text == "auto":
        VOICE.get().say("device: cpu, as torch finds no GPU" if found == "cpu" else
                        f"device: {found}, {torch.cuda.get_device_name(found)}")
    return found


def parse_options(texts: list[str] | None) -> dict[str, Any]:
    """Return encoder options from `name=value` texts; values are JSON where they parse, else strings."""
    options: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise CodecConfigError(f"--option '{text}': expected name=value")
        try:
            options[name] = files.parse_json(value)
        except ValueError:
            options[name] = value
    return options


def emit(record: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a flat record as JSON or as a two-column table."""
    if as_json:
        typer.echo(json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False))
        return
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for label, text in readable(record):
        table.add_row(label, Text(text))
    show(table)


def show(table: Table) -> None:
    """Print a table; names are broken where the terminal ends, and never elsewhere."""
    for column in table.columns:
        column.overflow = "fold"
    (out if out.is_terminal else Console(width=WIDE)).print(table)


def _finite(value: Any) -> Any:
    """Return None for infinities and NaN, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_new(to: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that does not exist yet; it appears whole or not at all.

    Raises
    ------
    FileExistsError
        If `to` exists.
    OSError
        If it cannot be written; names the file.
    """
    refuse_existing(to)
    try:
        with whole(to) as partial, partial.open("xb") as handle:
            write(handle)
    except OSError as error:
        raise OSError(f"cannot write {to}: {error}") from error


def refuse_existing(path: Path) -> None:
    """Raise `FileExistsError` if `path` exists."""
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or name another output")


def open_source(src: Path, output: Path, dense: Sequence[str] | None = (), leave_out: list[str] | None = None) -> Any:
    """Return the source model of a command that writes `output`; what is staged for it goes when it does."""
    from tersor.hf.compress.work import WorkFolder
    from tersor.hf.models import source

    work = WorkFolder(output)
    found = source.open_source(existing_model(src), work / "staged", dense=dense, leave_out=leave_out or ())
    if found.folder == work / "staged":
        weakref.finalize(found, work.clear, "staged")
    return found


def existing_model(src: Path) -> Path:
    """Return a path that exists; see `existing`."""
    return existing(src, "a transformers model directory or a .gguf file")


def read_calibration(path: Path | None) -> Calibration | None:
    """Return the calibration in a file, or None without one."""
    return None if path is None else Calibration.load(existing(path, "a file written by 'tersor calibrate'"))


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises
    ------
    CodecConfigError
        If it is none.
    """
    try:
        return files.read_json(existing(path, "a JSON file"))
    except (IsADirectoryError, ValueError) as error:
        raise CodecConfigError(f"{path}: expected JSON: {error}") from error
