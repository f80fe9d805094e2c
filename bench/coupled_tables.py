"""The table of spatially coupled annealing in ADR 10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Line = Mapping[str, Any]
HEADER = ("ramp", "delay", "ahead every", "behind every", "windows away", "sweeps a sign", "error")


def rows(found: Mapping[str, Line]) -> list[list[str]]:
    """Return one row a case, by sweeps spent."""
    ordered = sorted(found.values(), key=lambda line: line["numbers"]["spent"])
    body = []
    for line in ordered:
        case, numbers = line["case"], line["numbers"]
        periods = [str(case[side]) if case[side] else "never" for side in ("ahead", "behind")]
        reach = str(case["reach"]) if case["reach"] < 99 else "all"
        body.append([str(case["ramp"]), str(case["delay"]), *periods, reach, f"{numbers['spent']:.0f}",
                     f"{numbers['relative_error']:.4f}"])
    return body
