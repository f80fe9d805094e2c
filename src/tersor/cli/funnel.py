"""One funnel: whatever ends a command becomes one line on stderr and an exit code."""

from __future__ import annotations

import difflib
import itertools
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import typer
from typer.core import TyperCommand

from tersor.cli.telling import CLOSED_PIPE, VOICE, Voice
from tersor.errors import TersorError

FAULT, USAGE, INTERRUPTED = 1, 2, 130
MOST_NAMES = 2000  # of a folder that are compared with a name
ALIASES = {"--method": "--codec", "--calib": "--calibration", "--calibration": "--calibration-text",
           "--text": "--calibration-text"}
_ClickError: Any = typer.BadParameter.__mro__[2]  # typer may carry a click of its own, and has no name for this


class Verb(TyperCommand):
    """A verb: takes the options' former names, and refuses both names at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with each former name replaced."""
        known = {name for param in self.params for name in param.opts}
        former = {old: new for old, new in ALIASES.items() if old not in known and new in known}
        given = [arg.partition("=")[0] for arg in args]
        for old, new in former.items():
            if old in given and new in given:
                raise typer.BadParameter(f"{new} and its other name {old}: expected one of them", ctx)
        return super().parse_args(ctx, [former[name] + arg[len(name):] if name in former else arg
                                        for name, arg in zip(given, args, strict=True)])


class Funnel:
    """Ends the program after its block: with status 0, or with a line on stderr and the status of what was raised."""

    def __enter__(self) -> None:
        VOICE.set(Voice())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is None:
            sys.exit(0)
        if isinstance(error, SystemExit):
            return
        if isinstance(error, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        text, code = account(error)
        voice, lines = VOICE.get(), "".join(traceback.format_exception(error))
        if code == FAULT and voice.verbose:
            typer.echo(lines, err=True)
        typer.echo(f"tersor: {text}", err=True)
        voice.log(f"{text}\n{lines}" if code == FAULT else text)
        sys.exit(code)


def account(error: BaseException) -> tuple[str, int]:
    """Return what to say of an exception, in one line, and the exit code."""
    if isinstance(error, TersorError):
        return _line(error), error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted; the same command goes on from here, if it is one that resumes", INTERRUPTED
    if isinstance(error, _ClickError):
        return _usage(error), USAGE
    if isinstance(error, OSError):
        return _file(error), USAGE
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"out of memory: {_line(error)}; see --dry-run for what a model needs", USAGE
    if isinstance(error, ModuleNotFoundError) and (error.name or "tersor").partition(".")[0] != "tersor":
        return f"needs the package '{error.name}'; install tersor[gguf,images]", USAGE
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(frame[0].filename).name}:{frame[0].lineno})" if frame else ""
    return (f"this is a fault of Tersor, please report it: {type(error).__name__}: {_line(error)[:200]}{where}; "
            "--verbose shows the traceback"), FAULT


def near(name: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'X'?` for the nearest of known names, or nothing."""
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean '{found[0]}'?" if found else ""


def near_file(path: Path) -> str:
    """Return `; did you mean 'X'?` for the nearest name in the folder that should hold a file, or nothing."""
    folder = path.absolute().parent
    try:
        if not folder.is_dir():
            return f"; there is no folder {path.parent} either"
        found = near(path.name, [child.name for child in itertools.islice(folder.iterdir(), MOST_NAMES)])
    except OSError:
        return ""  # a folder that may not be looked into
    return found.replace("'", f"'{path.parent}/", 1) if found and str(path.parent) != "." else found


def existing(path: Path, expected: str) -> Path:
    """Return a path that exists.

    Raises
    ------
    FileNotFoundError
        If it does not; says what was expected and which name is near.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; expected {expected}{near_file(path)}")
    return path


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _file(error: OSError) -> str:
    """Return the path and what is the matter with it."""
    if error.filename is None or error.strerror is None:
        return _line(error)
    path = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else str(error.filename)
    return f"{path}: {error.strerror}{near_file(Path(path)) if isinstance(error, FileNotFoundError) else ''}"


def _usage(error: Any) -> str:
    """Return one line on a command that cannot be understood, and where its help is."""
    ctx, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    text = _line(Exception(error.format_message())).rstrip(".").removeprefix("Invalid value: ")
    command = ctx.command_path if ctx is not None else "tersor"
    if option is not None and ctx is not None and "No such option" in text:
        text = f"no such option: {option}"
        options = [name for param in ctx.command.params for name in param.opts if name.startswith("--")]
        others = [name for name, verb in sorted(getattr(ctx.find_root().command, "commands", {}).items())
                  if any(option in param.opts for param in verb.params)]
        if others:
            text += f"; it is an option of {' and '.join(f'tersor {name}' for name in others)}"
        else:
            text += near(option, options)
    text = text[:1].lower() + text[1:].replace(". Did you", "; did you")
    return f"{text}{'' if text.endswith('?') else ';'} see '{command} --help'"


