"""The tables of products on the processor."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.cpu import cases

HEADER = ["codec", "vectors", "float32, ms", "times dense float32", "bf16, ms", "times dense bf16", "asked", ""]


def one_table(found: Mapping[str, Line]) -> str:
    """One vector."""
    return table(HEADER, _rows(found, (1,)))


def several_table(found: Mapping[str, Line]) -> str:
    """Several vectors."""
    return table(HEADER, _rows(found, (4, 16, 64)))


def _rows(found: Mapping[str, Line], vectors: tuple[int, ...]) -> list[list[str]]:
    rows = []
    for case in cases.CASES:
        line = found.get(case.key)
        if line is None or case.vectors not in vectors:
            continue
        numbers = line["numbers"]
        times = [cell for kind in ("float32", "bfloat16")
                 for cell in (f"{numbers[f'{kind}_ms']:.2f}", f"{numbers[f'{kind}_ratio']:.2f}")]
        asked = "" if case.asked is None else f"{case.asked:.2g}"
        rows.append([f"`{case.codec}`", str(case.vectors), *times, asked, verdict(numbers.get("passed"))])
    return rows


TABLES = {"cpu_product_one": Table(one_table), "cpu_product_several": Table(several_table)}
