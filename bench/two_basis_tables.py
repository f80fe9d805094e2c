"""The table of the two-basis suite; `tables.py` splices it into the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
DATA = ("gaussian", "student_t3", "outliers")


def table(found: Mapping[str, Line]) -> str:
    """Errors by bits and sweeps on three kinds of data, then what a sweep costs."""
    errors: dict[tuple[Any, ...], dict[str, Line]] = {}
    speeds = []
    for line in found.values():
        case = line["case"]
        if line["key"].startswith("speed|"):
            speeds.append(line)
        else:
            place = (case["device"], case["bits"], f"{case['rows']} x {case['width']}", case["sweeps"], case["method"])
            errors.setdefault(place, {})[case["data"]] = line
    rows = []
    for (device, _, shape, sweeps, method), lines in sorted(errors.items()):
        first = next(iter(lines.values()))
        target = next((line["case"]["target"] for line in lines.values() if line["case"]["target"] is not None), None)
        rows.append([f"`{method}`", device, shape, str(sweeps) if sweeps else "", f"{first['numbers']['rate']:.3f}",
                     *(f"{lines[data]['numbers']['relative_error']:.4f}" if data in lines else "" for data in DATA),
                     "" if target is None else f"{target:.4f}".rstrip("0"), _verdict(target, lines.values())])
    wide = _table(["relative MSE", "device", "matrix", "sweeps", "bits per element", "Gaussian",
                   "Student t, 3 d.o.f.", "outlier columns", "at most", ""], rows)
    costs = _table(["a sweep at 2 bits", "measured", "at most", "floor", ""], [_cost(line) for line in speeds])
    return f"{wide}\n\n{costs}" if speeds else wide


def _cost(line: Line) -> list[str]:
    """Return a row: nanoseconds a weight on a GPU, pairs of rotations on a processor."""
    case, numbers = line["case"], line["numbers"]
    shape = f"{case['rows']} x {case['width']}"
    verdict = _verdict(case["target"], [line])
    if case["device"] == "cpu":
        measured = f"{numbers['value']:.1f} pairs of rotations ({numbers['sweep_ns']:.1f} ns a weight)"
        return [f"processor, {shape}", measured, f"{case['target']:g} pairs", "", verdict]
    return [f"{numbers['device']}, {shape}",
            f"{numbers['value']:.4f} ns a weight ({numbers['encode']:.4f} with everything around it)",
            f"{case['target']:g} ns", f"products {numbers['floor_products']:.4f}, random numbers "
            f"{numbers['floor_integer']:.4f} ns", verdict]


def _verdict(target: float | None, lines: Any) -> str:
    passed = all(line["numbers"]["passed"] for line in lines)
    return "**fail**" if not passed else "" if target is None else "pass"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
