"""One mutant read, and what came of it: a typed error or the right result, in bounded memory and time."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._dynamo  # the first custom op to run imports it, for seconds: no part of reading a mutant

from tersor.errors import TersorError
from tests.hostile.mutations import damage

SECONDS = 20.0  # what reading a mutant may take, on a busy machine too; sound ones take less than a second
ROOM = 160 << 20  # bytes of address space beyond those of the sound file's reading, which take less than a tenth of it
GOOD = ("refused", "right")


class Hang(BaseException):
    """Reading has taken too long."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes
    ----------
    make : callable
        Writes a sound specimen, of a number, into an empty folder.
    read : callable
        Reads what lies in a folder through public functions; returns named tensors.
    sign : callable or None
        Makes digests right again.
    digested : bool
        Whether every change shows: what is not signed anew is refused, or reads as before.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], dict[str, Any]]
    sign: Callable[[Path], None] | None = None
    digested: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant: `refused`, `right`, `silent`, `untyped` or `hang`; and why."""

    verdict: str
    detail: str


@contextlib.contextmanager
def bounded(seconds: float, room: int) -> Iterator[None]:
    """Raise `Hang` after so many seconds; let no more than `room` further bytes of address space be taken."""
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(kind: Kind, sound: Path, folder: Path, seed: int) -> Outcome:
    """Damage a copy of a sound folder, read it, and say what came of it."""
    draw = random.Random(f"{kind.name} {seed}")  # every kind has mutants of its own
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    signed = kind.sign is not None and draw.random() < 0.5
    done = damage(folder, draw, signed=signed)
    if signed and kind.sign is not None:
        kind.sign(folder)
    wanted = expected(kind, sound)
    what = f"{kind.name} {seed}: {done}{', signed anew' if signed else ''}"
    try:
        with warnings.catch_warnings(), bounded(SECONDS, ROOM):
            warnings.simplefilter("ignore")
            found = kind.read(folder)
    except (TersorError, FileNotFoundError) as error:  # a path that the user names is Python's own to miss
        return Outcome("refused", f"{what}: {type(error).__name__}: {error}")
    except Hang:
        return Outcome("hang", f"{what}: {traceback.format_exc()[-1500:]}")
    except BaseException as error:  # whatever else comes is a fault, and is told as one
        if isinstance(error, KeyboardInterrupt):
            raise
        told = f"{type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc()[-1800:]}"
        return Outcome("untyped", f"{what}: {told}")
    odd = next((name for name, value in found.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
                and not bool(torch.isfinite(value).all())), None)
    if odd is not None:
        return Outcome("silent", f"{what}: '{odd}' holds NaN or infinity")
    if kind.digested and not signed and not same(found, wanted):
        return Outcome("silent", f"{what}: reads otherwise than what was written")
    return Outcome("right", what)


_EXPECTED: dict[tuple[str, Path], dict[str, Any]] = {}


def expected(kind: Kind, sound: Path) -> dict[str, Any]:
    """Return what the sound folder reads as, nothing where its kind is refused as such; read once."""
    if (kind.name, sound) not in _EXPECTED:
        try:
            _EXPECTED[kind.name, sound] = kind.read(sound)
        except TersorError:
            _EXPECTED[kind.name, sound] = {}
    return _EXPECTED[kind.name, sound]


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Tell whether two readings are equal, in the order of names or not."""
    return set(found) == set(wanted) and all(
        torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        for name, value in wanted.items())
