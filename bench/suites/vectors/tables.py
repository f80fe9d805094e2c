"""The table of vector sets; `tables.py` shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Line = Mapping[str, Any]
HEADS = ("method", "bytes a vector", "tables included", "recall@10", "relative MSE", "queries/s, batch",
         "queries/s, single", "train, s", "encode, s")


def vectors_table(data: str, bits: int) -> Callable[[Mapping[str, Line]], str]:
    """Return the builder of the table of one set at one rate, best recall first."""
    def build(found: Mapping[str, Line]) -> str:
        chosen = [line for line in found.values() if (line["case"]["data"], line["case"]["bits"]) == (data, bits)]
        measured = [line for line in chosen if "recall" in line["numbers"]]
        measured.sort(key=lambda line: -line["numbers"]["recall"])
        rows = [HEADS, ("---", *("---:" for _ in HEADS[1:])), *(_row(line) for line in measured)]
        failed = [line for line in chosen if "recall" not in line["numbers"]]
        notes = [f"\n{_name(line)}: {line['numbers']['cannot']}." for line in failed]
        return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *notes])
    return build


def _name(line: Line) -> str:
    engine, _, method = line["case"]["method"].partition(":")
    codec = line["numbers"].get("codec", method)
    stages = codec.removeprefix("sum(").rstrip(")").split(";")
    if len(stages) > 2:
        codec = f"sum of {len(stages)} {stages[0]}"
    return f"**Tersor** `{codec}`" if engine == "tersor" else f"FAISS {codec.removesuffix('np')}"


def _row(line: Line) -> tuple[str, ...]:
    numbers = line["numbers"]
    total = line["bytes"] / numbers["vectors"]
    return (_name(line), f"{numbers['stored_bytes']:.4g}", f"{total:.4g}", f"{numbers['recall']:.3f}",
            f"{numbers['relative_mse']:.4f}", f"{numbers['queries_per_s']:.0f}",
            f"{numbers['single_queries_per_s']:.0f}", f"{numbers['train_s']:.1f}", f"{numbers['encode_s']:.1f}")
