"""Two-basis codes."""

from collections.abc import Iterator, Sequence
from typing import Any

from bench.suite import Asked, Outcome, Suite, deferred
from bench.suites.two_basis import tables
from bench.suites.two_basis.cases import LanguageCase, Matrices, cases


def measure(chosen: Sequence[Any], asked: Asked) -> Iterator[Outcome]:
    """Yield synthetic matrices, then real ones and models."""
    real = [case for case in chosen if isinstance(case, (Matrices, LanguageCase))]
    yield from deferred("bench.suites.two_basis.synthetic")([case for case in chosen if case not in real], asked)
    if real:
        yield from deferred("bench.suites.two_basis.models")(real, asked)


SUITES = (
    Suite("two_basis", "error by bits, data and sweeps, half a minute; feedback, speed; real matrices and models",
          cases, measure, tables.TABLES),
)
