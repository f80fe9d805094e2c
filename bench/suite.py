"""What a suite is: cases, how they are measured, and the tables made of its lines. `run.py` runs suites."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.places import MODELS

Line = Mapping[str, Any]
Builder = Callable[[Mapping[str, Line]], str]


class RefusedError(Exception):
    """What was asked for is not done; the message says why."""


class Case(Protocol):
    """One thing to be measured: a frozen dataclass, whose `key` names its result line."""

    @property
    def key(self) -> str:
        """The name of the result line; a later line of the same key replaces an earlier one in tables."""
        ...


@dataclasses.dataclass(frozen=True)
class Section:
    """A case that yields result lines of many keys: a part of a suite that is measured as a whole."""

    name: str

    @property
    def key(self) -> str:
        """The section's name."""
        return self.name


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line says beside the cases.

    Attributes
    ----------
    device : str
        "cpu" or "cuda".
    models : Path
        Folder of fable-7m and fable-22m.
    out : Path or None
        Folder of result lines and of tracebacks, where results do not go to bench/results.
    """

    device: str = "cpu"
    models: Path = MODELS
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes
    ----------
    key : str
    case : mapping
        The case's fields.
    nbytes : int
        Every stored byte; 0 where nothing is stored.
    numbers : dict
        JSON-able. `passed` is False, or `red` is True, where a target is missed.
    seed : int
    device : str
        Name of the accelerator, where one measured.
    """

    key: str
    case: Mapping[str, Any]
    nbytes: int
    numbers: dict[str, Any]
    seed: int = 0
    device: str = ""

    @classmethod
    def of(cls, case: Case, nbytes: int, numbers: dict[str, Any], **others: Any) -> Result:
        """Return the result of a case."""
        return cls(case.key, dataclasses.asdict(case), nbytes, numbers, **others)  # type: ignore[call-overload]

    @property
    def missed(self) -> bool:
        """Whether a target is missed, or the result is wrong."""
        return self.numbers.get("passed") is False or self.numbers.get("red") is True


@dataclasses.dataclass(frozen=True)
class Unmeasured:
    """A case without a result: `failed`, or left out since it cannot be measured here."""

    key: str
    why: str
    failed: bool = False


Outcome = Result | Unmeasured
Measure = Callable[[Sequence[Any], Asked], Iterator[Outcome]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table in the documents: the lines that it shows, by the beginnings of their keys (none: all), and its builder.

    `source` is the suite whose lines it shows, where that is another one than the suite that brings the table. A table
    that is `charged` counts what comes with the package (`charges.py`); under others that is said. Under a `bare` one
    nothing is said: the text around it says where the same figures stand with their origin. `on` is a part of the
    name of the machine whose lines it shows, where another's stand elsewhere.
    """

    build: Builder
    prefixes: tuple[str, ...] = ()
    source: str = ""
    charged: bool = False
    bare: bool = False
    on: str = ""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark; its lines lie in `bench/results/<name>.jsonl`.

    Attributes
    ----------
    name : str
    what : str
        One line for `run.py --list`.
    cases : callable
        Device to its cases.
    measure : callable
        Cases and what else was asked for to outcomes, each as soon as it is there.
    tables : mapping
        Name of a table to the table.
    needs : tuple of str
        Packages without which nothing of the suite can be measured.
    threads : int
        Of torch.
    """

    name: str
    what: str
    cases: Callable[[str], Sequence[Any]]
    measure: Measure
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    threads: int = 1

    def lacking(self) -> list[str]:
        """Return the packages that the suite needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def deferred(module: str, function: str = "measure") -> Measure:
    """Return a function of a module that is imported when it is called: suites are listed without what they need."""
    def measure(cases: Sequence[Any], asked: Asked) -> Iterator[Outcome]:
        return getattr(importlib.import_module(module), function)(cases, asked)
    return measure


def always(cases: Iterable[Any]) -> Callable[[str], Sequence[Any]]:
    """Return a `Suite.cases` of cases that are the same on every device."""
    held = tuple(cases)
    return lambda device: held


def sections(*names: str) -> Callable[[str], Sequence[Section]]:
    """Return a `Suite.cases` of sections."""
    return always(Section(name) for name in names)


def chosen(cases: Iterable[Any], words: Iterable[str]) -> list[Any]:
    """Return the cases whose key holds every word; of a word `a/b/c` one of its parts; a part `a$` is its end."""
    def holds(key: str, part: str) -> bool:
        return key.endswith(part[:-1]) if part.endswith("$") else part in key

    asked = [word.split("/") for word in words]
    return [case for case in cases if all(any(holds(case.key, part) for part in parts) for parts in asked)]
