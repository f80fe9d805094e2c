"""What the commands share: option types, printing, progress bars and new files."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tersor import files
from tersor.errors import BudgetError, CodecConfigError
from tersor.files import whole
from tersor.planning.calibration import Calibration

out, err = Console(), Console(stderr=True)

Src = Annotated[Path, typer.Argument(help="a transformers model directory, or a .gguf file")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="output directory; must not exist")]
Rate = Annotated[float | None, typer.Option(help="bits per element, everything stored counted")]
Size = Annotated[str | None, typer.Option(help="size on disk: 5MB, 900kB, 2GB (1 MB = 10^6 bytes)")]
Method = Annotated[str, typer.Option(help="a family (see `tersor families`)")]
CodecText = Annotated[str | None, typer.Option("--codec", help="a codec string, such as rot,lm3 or rtn4g64; of a "
                                               "matrix also a family")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Seed = Annotated[int, typer.Option(help="seed of the encoder's search")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
OptionTexts = Annotated[list[str] | None, typer.Option("--option", help="encoder option, name=value; repeatable")]
Sensitivities = Annotated[Path | None, typer.Option(help="JSON: matrix name to weight of its relative distortion")]
Dense = Annotated[list[str] | None, typer.Option(
    "--dense", metavar="PATTERN", help="leave the parameters that this shell pattern matches as they are; repeatable")]
LeaveOut = Annotated[list[str] | None, typer.Option(
    "--leave-out", metavar="PATTERN", help="leave out tensors that no parameter takes, which are carried along "
    "otherwise; repeatable")]
Calib = Annotated[Path | None, typer.Option("--calib", help="file written by `tersor calibrate`")]
CalibrationText = Annotated[Path | None, typer.Option("--calibration", help="calibration text; default: packaged")]
HeldoutText = Annotated[Path | None, typer.Option("--text", help="held-out text; default: packaged")]
Tokens = Annotated[int, typer.Option(help="calibration tokens")]
EvaluationTokens = Annotated[int, typer.Option(help="evaluation tokens; 0: none")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume")]
Context = Annotated[int, typer.Option(help="window length in tokens")]


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `5MB`; 1 MB = 10^6 bytes.

    Raises
    ------
    BudgetError
        If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)B?\s*", text)
    if not match:
        raise BudgetError(f"size '{text}': expected a number and a unit, such as 5MB, 900kB, 2GB or 123456")
    return int(float(match[1]) * {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


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


class Bars:
    """Progress bars on stderr, one a stage."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                   TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=err, disable=not err.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._progress.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


def emit(record: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a flat record as JSON or as a two-column table."""
    if as_json:
        typer.echo(json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False))
        return
    table = Table(title=title, show_header=False)
    for key, value in record.items():
        if not isinstance(value, (dict, list)):
            table.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
    out.print(table)


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


def open_source(src: Path, output: Path) -> Any:
    """Return the source model of a command that writes `output`; what is staged for it goes when it does."""
    from tersor.hf.compress.work import WorkFolder
    from tersor.hf.models import source

    work = WorkFolder(output)
    found = source.open_source(src, work / "staged")
    if found.folder == work / "staged":
        weakref.finalize(found, work.clear, "staged")
    return found


def read_calibration(path: Path | None) -> Calibration | None:
    """Return the calibration in a file, or None without one."""
    return None if path is None else Calibration.load(path)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises
    ------
    CodecConfigError
        If it is none.
    """
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise CodecConfigError(f"{path}: expected JSON: {error}") from error
