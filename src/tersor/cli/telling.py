"""What a command says while it works: bars on a terminal, lines elsewhere, a log file."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tersor.cli.figures import seconds_text
from tersor.figures import Amount, size_text

err = Console(stderr=True)
EVERY = 30.0  # seconds between two lines of one stage
EVERY_VERBOSE = 5.0
CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


@dataclasses.dataclass(frozen=True)
class Voice:
    """What the user wants to hear.

    Attributes
    ----------
    quiet : bool
        Errors only.
    verbose : bool
        Progress more often, and tracebacks of faults.
    log_file : Path or None
        Where lines go as well, with the time of day; appended to.
    """

    quiet: bool = False
    verbose: bool = False
    log_file: Path | None = None

    def say(self, text: str) -> None:
        """Tell a notice."""
        if not self.quiet:
            err.print(f"tersor: {text}", soft_wrap=True, markup=False, highlight=False)
        self.log(text)

    def log(self, text: str) -> None:
        """Write lines to the log file, if there is one; work does not end because it can no longer be written."""
        with contextlib.suppress(OSError):
            self.write(text)

    def write(self, text: str) -> None:
        """Write lines to the log file, if there is one.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        if self.log_file is not None:
            with self.log_file.open("a", encoding="utf-8", errors="backslashreplace") as handle:
                handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


VOICE: contextvars.ContextVar[Voice] = contextvars.ContextVar("voice", default=Voice())  # noqa: B039 - frozen

Quiet = Annotated[bool, typer.Option("--quiet", help="no progress and no notices; errors are still told")]
Verbose = Annotated[bool, typer.Option("--verbose", help="progress more often; tracebacks of faults")]
LogFile = Annotated[Path | None, typer.Option("--log-file", help="file that progress and errors are appended to")]
SPEECH = {"quiet": Quiet, "verbose": Verbose, "log_file": LogFile}


def set_voice(quiet: bool, verbose: bool, log_file: Path | None) -> None:
    """Add to what the user wants to hear; what was said before the verb stays."""
    before = VOICE.get()
    voice = Voice(quiet or before.quiet, verbose or before.verbose, log_file or before.log_file)
    VOICE.set(voice)
    voice.write(f"tersor {' '.join(sys.argv[1:])}")  # a log that cannot be written is refused before any work


def tell_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print a warning without the place in the code, which says nothing to a user."""
    del category, place
    VOICE.get().say(f"warning: {' '.join(str(message).split())}")


def spoken(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb that also takes `--quiet`, `--verbose` and `--log-file`."""

    @functools.wraps(verb)
    def run(*, quiet: bool, verbose: bool, log_file: Path | None, **given: Any) -> None:
        set_voice(quiet, verbose, log_file)
        try:
            verb(**given)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None

    own = inspect.signature(verb, eval_str=True)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None if name == "log_file" else False,
                               annotation=kind) for name, kind in SPEECH.items()]
    run.__dict__["__signature__"] = own.replace(parameters=[*own.parameters.values(), *added])
    run.__annotations__ = {**verb.__annotations__, **SPEECH}
    return run


class Bars:
    """Progress of stages: bars on a terminal; elsewhere, and in the log file, a line a stage and one every 30 s."""

    def __init__(self) -> None:
        self._voice = VOICE.get()
        columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                   TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=err, disable=self._voice.quiet or not err.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._lines = Lines(self._say)

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._progress.start()
        self._lines.start(EVERY_VERBOSE if self._voice.verbose else EVERY)
        return self._update

    def __exit__(self, *_: object) -> None:
        self._lines.stop()
        self._progress.stop()

    def _say(self, text: str) -> None:
        if self._progress.disable:
            self._voice.say(text)
        else:
            self._voice.log(text)

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)
        self._lines.update(stage, done, total)


class Lines:
    """Progress as lines: one when a stage begins, one when it ends if it was long, and one now and then between.

    A thread of its own tells the time, so that a long step is not a silent one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._lock, self._ended = say, threading.Lock(), threading.Event()
        self._stage, self._done, self._total = "", 0, 0
        self._amount = Amount(0)
        self._began = self._told = time.monotonic()
        self._ended_at: float | None = None
        self._thread: threading.Thread | None = None

    def start(self, every: float) -> None:
        """Begin to tell the time."""
        self._thread = threading.Thread(target=self._tick, args=(every,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def update(self, stage: str, done: int, total: int) -> None:
        """Take note of a stage's progress; an `Amount` says more than a count."""
        with self._lock:
            self._amount = done if isinstance(done, Amount) else Amount(done)
            now, fresh = time.monotonic(), stage != self._stage
            if fresh:
                self._stage, self._began = stage, now
            finished = done >= total and self._done < self._total and not fresh
            self._done, self._total, self._ended_at = done, total, now if done >= total else None
            if fresh or (finished and now - self._began >= 1):
                self._tell(now)

    def _tick(self, every: float) -> None:
        while not self._ended.wait(min(1.0, every)):
            with self._lock:
                now = time.monotonic()
                if now - self._told >= every and self._stage:
                    self._tell(now)

    def _tell(self, now: float) -> None:
        self._told, elapsed = now, now - self._began
        text = f"{self._stage}: {self._done} of {self._total}"
        if self._ended_at is not None and now > self._ended_at:
            text = f"after {self._stage}"
        if self._amount.place:
            text += f", {self._amount.place}"
        if self._amount.nbytes and elapsed >= 1:
            text += f", {size_text(self._amount.nbytes / elapsed)}/s"
        if self._amount.memory and elapsed >= 1:
            text += f", {size_text(self._amount.memory)} in memory"
        if elapsed >= 1:
            text += f", {seconds_text(elapsed)}"
        if 0 < self._done < self._total and elapsed >= 1:
            text += f", about {seconds_text(elapsed * (self._total - self._done) / self._done)} left"
        self._say(text)
