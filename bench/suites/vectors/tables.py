"""The tables of vector sets."""

from __future__ import annotations

from collections.abc import Mapping

from bench.charges import charged
from bench.markdown import table
from bench.suite import Builder, Line, Table

HEADS = ("method", "bytes a vector", "tables included", "recall@10", "relative MSE", "queries/s, batch",
         "queries/s, single", "train, s", "encode, s")


def vectors_table(data: str, bits: float) -> Builder:
    """Return the builder of the table of one set at one rate, best recall first."""
    def build(found: Mapping[str, Line]) -> str:
        chosen = [line for line in found.values() if (line["case"]["data"], line["case"]["bits"]) == (data, bits)]
        measured = [line for line in chosen if "recall" in line["numbers"]]
        measured.sort(key=lambda line: -line["numbers"]["recall"])
        failed = [line for line in chosen if "recall" not in line["numbers"]]
        notes = [f"\n{_name(line)}: {line['numbers']['cannot']}." for line in failed]
        return "\n".join([table(HEADS, map(_row, measured)), *notes])
    return build


def _name(line: Line) -> str:
    engine, _, method = line["case"]["method"].partition(":")
    codec = line["numbers"].get("codec", method)
    stages = codec.removeprefix("sum(").rstrip(")").split(";")
    if len(stages) > 2:
        codec = f"sum of {len(stages)} {stages[0]}"
    method = method.partition(",")[0] + "," if method.startswith("IVF") else ""
    return f"**Tersor** `{method}{codec}`" if engine == "tersor" else f"FAISS {codec.removesuffix('np')}"


def _row(line: Line) -> tuple[str, ...]:
    numbers = line["numbers"]
    total = charged(line) / numbers["vectors"]
    return (_name(line), f"{numbers['stored_bytes']:.4g}", f"{total:.4g}", f"{numbers['recall']:.3f}",
            f"{numbers['relative_mse']:.4f}", f"{numbers['queries_per_s']:.0f}",
            f"{numbers['single_queries_per_s']:.0f}", f"{numbers['train_s']:.1f}", f"{numbers['encode_s']:.1f}")


TABLES = {
    "vectors-glove-2": Table(vectors_table("glove", 2), ("glove",), charged=True),
    "vectors-glove-4": Table(vectors_table("glove", 4), ("glove",), charged=True),
    "vectors-banking77": Table(vectors_table("banking77", 2), ("banking77",), charged=True),
}
