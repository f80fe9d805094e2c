"""The table of what the dry run foretells."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.compress import cases

HEADER = ["model", "memory, MB", "foretold", "seconds", "foretold", "within 30 %"]


def foretold_table(found: Mapping[str, Line]) -> str:
    """Peak memory and seconds, measured and foretold."""
    rows = []
    for case in cases.FORETOLD:
        line = found.get(case.key)
        if line is not None:
            numbers = line["numbers"]
            told = numbers["foretold"]
            rows.append([case.model, f"{numbers['peak_bytes'] / 1e6:.0f}", f"{told['peak_memory_bytes'] / 1e6:.0f}",
                         f"{numbers['seconds']:.0f}", f"{told['seconds']:.0f}", verdict(numbers.get("passed"))])
    return table(HEADER, rows)


TABLES = {"foretold": Table(foretold_table)}
