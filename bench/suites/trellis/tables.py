"""The table of trellis codes."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.trellis import cases


def filters_table(found: Mapping[str, Line]) -> str:
    """Error of every filter, by bits and window."""
    rows = []
    for case in cases.CASES:
        line = found.get(case.key)
        if line is None:
            continue
        numbers = line["numbers"]
        asked = ["", ""] if case.target is None else [f"{case.target:g}", verdict(numbers["passed"])]
        rows.append([f"`{case.codec}`", f"{case.bits:g}", str(case.memory), f"{numbers['rate']:.3f}",
                     f"{numbers['relative_mse']:.5f}", f"{numbers['shannon_gap_db']:.2f}", *asked])
    return table(["codec", "bits of a stream", "window", "bits per element", "relative error", "dB to Shannon", "asked",
                  ""], rows)


TABLES = {"trellis": Table(filters_table)}
