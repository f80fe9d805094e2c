"""Tables of the LPLR suite; `tables.py` splices them into the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
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
                         *(_cell(numbers, name) for name in MATRICES), _verdict(numbers)])
        if case["data"] == "phantom":
            spread = f" ± {numbers['deviation']:.3f}" if numbers["deviation"] else ""
            image.append([rate, widths, METHODS[case["method"]], f"{numbers['errors']['phantom']:.4f}{spread}",
                          _shown(numbers["targets"]["phantom"]), _verdict(numbers)])
    wide = _table(["bits", "B/B'", "method", *MATRICES, ""], body)
    tall = _table(["bits", "B/B'", "phantom", "measured", "released code", ""], image)
    return f"{wide}\n\n{tall}\n\n{_summary(found.values())}"


def _summary(lines: Any) -> str:
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


def _verdict(numbers: Mapping[str, Any]) -> str:
    return "" if numbers["passed"] is None else "pass" if numbers["passed"] else "**fail**"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
