"""The table of LPLR's reproduction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bench.markdown import table, verdict
from bench.suite import Line, Table

MATRICES = ("exp32", "pow1", "pow05", "lr32n", "outl", "relu", "gauss")
METHODS = {"lplr": "LPLR", "lplr_ns": "LPLR", "lsvd": "LSVD", "lsvd_ns": "LSVD",
           "dsvd": "DSVD", "dsvd_ns": "DSVD", "nq": "NQ", "fitted": "NQ, fitted: `std,lm{}o`"}


def reproduction_table(found: Mapping[str, Line]) -> str:
    """Tersor's errors, the released code's in brackets, by rate and widths; then the phantom; then all verdicts."""
    lines = [line for line in found.values() if line["case"]["implementation"] == "tersor"]
    body, image = [], []
    for line in lines:
        case, numbers = line["case"], line["numbers"]
        rate, _, widths = case["setting"].partition(" ")
        whole = case["method"] in ("nq", "fitted")
        if case["data"] == "matrices" and case["method"] != "lplr_ns" and (widths == "8/8" or not whole):
            body.append([rate, "" if whole else widths, METHODS[case["method"]].format(rate),
                         *(_cell(numbers, name) for name in MATRICES), verdict(numbers["passed"])])
        if case["data"] == "phantom":
            spread = f" ± {numbers['deviation']:.3f}" if numbers["deviation"] else ""
            image.append([rate, widths, METHODS[case["method"]], f"{numbers['errors']['phantom']:.4f}{spread}",
                          _shown(numbers["targets"]["phantom"]), verdict(numbers["passed"])])
    wide = table(["bits", "B/B'", "method", *MATRICES, ""], body)
    tall = table(["bits", "B/B'", "phantom", "measured", "released code", ""], image)
    return f"{wide}\n\n{tall}\n\n{_summary(found.values())}"


def _summary(lines: Iterable[Line]) -> str:
    counts: dict[str, list[bool]] = {}
    for line in lines:
        if line["numbers"]["passed"] is not None:
            counts.setdefault(line["case"]["implementation"], []).append(bool(line["numbers"]["passed"]))
    parts = [f"{sum(held)} of {len(held)} {'by Tersor' if name == 'tersor' else f'by the {name}'}"
             for name, held in counts.items()]
    return f"Settings of a method in which every figure with a target is met: {', '.join(parts)}."


def _cell(numbers: Mapping[str, Any], name: str) -> str:
    target = numbers["targets"][name]
    return f"{numbers['errors'][name]:.3f}" + ("" if target is None else f" ({target:.3f})")


def _shown(target: float | None) -> str:
    return "" if target is None else f"{target:.4g}"


TABLES = {"lplr-reproduction": Table(reproduction_table, ("reproduction",))}
