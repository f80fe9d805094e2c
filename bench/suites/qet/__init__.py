"""QET: do the released code's figures reproduce, and what is it worth at equal bytes."""

from collections.abc import Iterator, Sequence
from typing import Any

from bench.suite import Asked, Outcome, Section, Suite, always, deferred
from bench.suites.qet import cases, tables

REPRODUCTION = tuple(Section(name) for name in ("released", "swaps", "penalties"))


def measure(chosen: Sequence[Any], asked: Asked) -> Iterator[Outcome]:
    """Yield the sections of the reproduction, then the cells of the grid."""
    parts = [case for case in chosen if isinstance(case, Section)]
    yield from deferred("bench.suites.qet.reproduction")(parts, asked)
    yield from deferred("bench.suites.qet.grid")([case for case in chosen if case not in parts], asked)


SUITES = (
    Suite("qet", "the released code's figures, 1 minute; the grid of methods at equal bytes, an hour",
          always((*REPRODUCTION, *cases.GRID_CASES)), measure, tables.TABLES, ("scipy", "transformers")),
)
