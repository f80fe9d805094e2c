"""Tables of the QET suite: the released code's figures, and the grid at equal bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.qet import cases


@dataclasses.dataclass(frozen=True)
class Cell:
    """A matrix at a rate: normalized MSE by method, NaN where a method was not measured or cannot run."""

    data: str
    bits: int
    errors: Mapping[str, float]

    def best(self, methods: Iterable[str]) -> float:
        """Return the least error of some methods."""
        known = [self.errors[method] for method in methods if not math.isnan(self.errors[method])]
        return min(known, default=math.nan)

    @property
    def ours(self) -> float:
        """The error of `qet_plus`."""
        return self.errors["tersor:qet_plus"]

    @property
    def qet(self) -> float:
        """The least error of a published form, its swaps included."""
        return self.best(cases.GRID_QET)

    @property
    def house(self) -> float:
        """The least error of the codecs that the house had."""
        return self.best(cases.GRID_HOUSE)


def grid_cells(found: Mapping[str, Line]) -> list[Cell]:
    """Return the cells of the QET grid of which anything was measured."""
    cells = []
    for data in cases.GRID_DATA:
        for bits in cases.GRID_BITS:
            lines = {method: found.get(cases.GridCase(data, bits, method).key) for method in cases.GRID_METHODS}
            held = {method: line["numbers"]["nmse"] if line else None for method, line in lines.items()}
            if any(lines.values()):
                cells.append(Cell(data, bits, {method: math.nan if error is None else error
                                               for method, error in held.items()}))
    return cells


GRID_COLUMNS = {"Lloyd-Max, std": ("standardized_lm",), "rot, Lloyd-Max": ("tersor:rotated_scalar",),
                "house, other": ("tersor:scalar", "tersor:uniform"), "PQ": ("pq",), "PQ + residual": ("pq_residual",),
                "FAISS PQ": ("faiss:pq",), "OPQ": ("faiss:opq",), "RQ": ("faiss:rq",), "LSQ": ("faiss:lsq",),
                "best QET": cases.GRID_QET, "**`qet_plus`**": ("tersor:qet_plus",)}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}" if value >= 0.01 else f"{value:.5f}"


def grid_table(found: Mapping[str, Line]) -> str:
    """The QET grid: normalized MSE at equal total bytes, and `qet_plus` as a fraction of what it must beat."""
    rows = []
    for cell in grid_cells(found):
        against = (cell.ours / cell.qet, cell.ours / cell.house)
        rows.append([f"{cell.data}, {cell.bits} bits", *(_number(cell.best(names)) for names in GRID_COLUMNS.values()),
                     *("" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in against)])
    return table(["nMSE", *GRID_COLUMNS, "/ best QET", "/ best of the house"], rows)


def reproduction_table(found: Mapping[str, Line]) -> str:
    """The figures of QET's released code and of its theory, beside the transcription's and Tersor's."""
    rows: dict[str, dict[str, Line]] = {}
    for line in found.values():
        case = line["case"]
        estimate = f" ({case['implementation']})" if case["check"] == "penalty" else ""
        name = f"{case['check'].replace('_', ' ')}{estimate}, {case['data']}, {case['method']}"
        rows.setdefault(name, {})["tersor" if case["implementation"] == "tersor" else "transcription"] = line
    body = []
    for name, lines in rows.items():
        one = next(iter(lines.values()))
        shown = [lines[column]["numbers"].get("shown") or f"{lines[column]['numbers']['value']:.4g}"
                 if column in lines else "" for column in ("transcription", "tersor")]
        target, judged = one["case"]["target"], [line["numbers"]["passed"] for line in lines.values()]
        body.append([name, "" if target is None or one["case"]["check"] == "order" else f"{target:g}", *shown,
                     f"{100 * one['case']['tolerance']:g} %" if one["case"]["tolerance"] else "",
                     verdict(None if target is None else all(judged))])
    return table(["check", "published", "transcription", "Tersor", "allowed", ""], body)


def grid_verdict(found: Mapping[str, Line]) -> str:
    """How `qet_plus` stands in every measured cell, and in how many it meets its targets."""
    cells = grid_cells(found)
    lead = sum(cell.ours <= cases.QET_LEAD * cell.qet for cell in cells)
    strict = sum(cell.ours <= cases.QET_LEAD * cell.best((*cases.GRID_QET, "pq_residual")) for cell in cells)
    house = sum(cell.ours <= cases.HOUSE_SLACK * cell.house for cell in cells)
    wanted = cases.QET_LEAD_CELLS, cases.HOUSE_CELLS
    return table(["`qet_plus`", "cells", "of", "wanted", ""], [
        [f"at most {cases.QET_LEAD} of the best published form", f"{lead}", f"{len(cells)}", f"{wanted[0]}",
         verdict(lead >= wanted[0])],
        ["the same, QET without swaps being a form", f"{strict}", f"{len(cells)}", "", ""],
        [f"at most {cases.HOUSE_SLACK} of the house's best", f"{house}", f"{len(cells)}", f"{wanted[1]}",
         verdict(house >= wanted[1])]])


TABLES = {
    "qet-grid": Table(grid_table, ("grid",)),
    "qet-verdict": Table(grid_verdict, ("grid",)),
    "qet-reproduction": Table(reproduction_table, ("reproduction",)),
}
