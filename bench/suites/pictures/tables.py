"""The tables of photographs."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table
from bench.suite import Builder, Line, Table


def pictures_table(rate: float) -> Builder:
    """Return the builder of the table of photographs at one rate: PSNR by layout, mean over the files."""
    def build(found: Mapping[str, Line]) -> str:
        held: dict[str, dict[str, list[float]]] = {}
        for line in found.values():
            case = line["case"]
            if case["rate"] == rate:
                by_layout = held.setdefault(case["method"], {})
                by_layout.setdefault(case["layout"], []).append(line["numbers"]["psnr_db"])
        layouts = ("patches", "stacked", "separate")
        body = [(f"`{method}`", *(f"{sum(of[k]) / len(of[k]):.2f}" if k in of else "" for k in layouts))
                for method, of in held.items()]
        body.sort(key=lambda row: -float(row[1] or 0))
        return table(("PSNR, dB", *layouts), body)
    return build


TABLES = {f"pictures-{rate}": Table(pictures_table(rate)) for rate in (1, 2)}
