"""The tables of photographs."""

from __future__ import annotations

from collections.abc import Mapping

from bench.charges import package_bytes
from bench.markdown import table
from bench.suite import Builder, Line, Table

SAMPLES = 768 * 512 * 3  # of each photograph


def pictures_table(rate: float) -> Builder:
    """Return the builder of the table of photographs at one rate: PSNR by layout, mean over the files."""
    def build(found: Mapping[str, Line]) -> str:
        held: dict[str, dict[str, list[float]]] = {}
        tables: dict[str, int] = {}
        for line in found.values():
            case = line["case"]
            if case["rate"] == rate:
                by_layout = held.setdefault(case["method"], {})
                by_layout.setdefault(case["layout"], []).append(line["numbers"]["psnr_db"])
                tables[case["method"]] = max(tables.get(case["method"], 0), package_bytes(line))
        layouts = ("patches", "stacked", "separate")
        body = [(f"`{method}`", *(f"{sum(of[k]) / len(of[k]):.2f}" if k in of else "" for k in layouts),
                 f"{tables[method]:,}", f"{rate + 8 * tables[method] / SAMPLES:.2f}") for method, of in held.items()]
        body.sort(key=lambda row: -float(row[1] or 0))
        return table(("PSNR, dB", *layouts, "bytes of the package's tables, at most", "bits a sample with them"), body)
    return build


TABLES = {f"pictures-{rate}": Table(pictures_table(rate), charged=True) for rate in (1, 2)}
