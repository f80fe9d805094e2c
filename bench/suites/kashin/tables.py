"""Tables of the Kashin suite; with the study's figures beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.markdown import table, verdict
from bench.suite import Line, Table

DATA = ("gaussian", "student_t3", "outliers")


def reproduction_table(found: Mapping[str, Line]) -> str:
    """The first table by method, with the study's figures in brackets; then everything else that was judged."""
    errors: dict[str, dict[str, Line]] = {}
    rest: list[Line] = []
    for line in found.values():
        case = line["case"]
        if case["check"] == "error":
            errors.setdefault(case["method"], {})[case["data"]] = line
        else:
            rest.append(line)
    body = []
    for method, lines in errors.items():
        first = next(iter(lines.values()))
        cells = [_cell(lines[data]) if data in lines else "" for data in DATA]
        body.append([_name(method), f"{first['numbers']['rate']:.3f}", *cells, _verdicts(lines.values())])
    wide = table(["relative MSE", "bits per element", "Gaussian", "Student t, 3 d.o.f.", "outlier columns", ""], body)
    orders = [line for line in rest if line["case"]["check"] == "order"]
    held = sum(bool(line["numbers"]["passed"]) for line in orders)
    rows = [[f"{line['case']['check']}, {line['case']['data']}, {line['case']['method']}", _cell(line),
             _verdicts([line])] for line in rest if line["case"]["check"] != "order"]
    rows.append(["orders of two methods on one kind of data that hold", f"{held} of {len(orders)}",
                 verdict(held == len(orders))])
    return f"{wide}\n\n{table(['check', 'measured (study)', ''], rows)}"


def _name(method: str) -> str:
    """Return a method with its codec string, if it is one, set as code."""
    codec, comma, note = method.partition(", ")
    return f"`{codec}`{comma}{note}" if codec.startswith(("rot", "kashin")) else method


def _cell(line: Line) -> str:
    """Return the figure, with the study's in brackets."""
    value, shown = line["numbers"]["value"], line["case"]["shown"]
    number = f"{value:.4f}" if line["case"]["check"] in ("error", "matrix") else f"{value:.2g}"
    return number if shown is None else f"{number} ({shown:g})"


def _verdicts(lines: Any) -> str:
    found = {line["numbers"]["verdict"] for line in lines} - {""}
    return "**fail**" if "fail" in found else "better" if "better" in found else "pass" if found else ""


TABLES = {"kashin-reproduction": Table(reproduction_table, ("reproduction",))}
