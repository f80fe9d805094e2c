"""The tables of compressed embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from bench.charges import charged
from bench.markdown import table
from bench.suite import Builder, Line, Table

HEADS = ("method", "bytes", "with the package's tables", "bits per element", "relative Frobenius error",
         "accuracy", "weighted F1", "accuracy, decoded queries", "encode, s")
NAMES = {"lplr": "LPLR, as published", "lsvd": "LSVD, as published", "dsvd": "DSVD, as published",
         "original": "uncompressed, float32"}
PREFIXES = {"mm": "NQ, min-max, as published", "fit": "NQ, fitted levels"}


def embeddings_table(bits: int) -> Builder:
    """Return the builder of the table at one rate, least error first, with the original on top."""
    def build(found: Mapping[str, Line]) -> str:
        chosen = [line for line in found.values() if line["case"]["bits"] in (0, bits)]
        chosen.sort(key=lambda line: line["numbers"]["frobenius"])
        return table(HEADS, map(_row, chosen))
    return build


def _name(line: Line) -> str:
    method, codec = line["case"]["method"], line["numbers"]["codec"]
    if method in NAMES:
        return NAMES[method] if method == "original" else f"{NAMES[method]} `{codec}`"
    published = [name for prefix, name in PREFIXES.items() if method.startswith(prefix)]
    if published:
        return f"{published[0]} `{codec}`"
    return f"**Tersor** `{method}`" if method == codec or len(codec) > 40 else f"**Tersor** `{method}`, `{codec}`"


def _row(line: Line) -> tuple[str, ...]:
    numbers = line["numbers"]
    return (_name(line), f"{line['bytes']:,}", f"{charged(line):,}", f"{numbers['rate']:.3f}",
            f"{numbers['frobenius']:.4f}",
            f"{100 * numbers['accuracy_raw']:.2f} %", f"{100 * numbers['f1_raw']:.2f} %",
            f"{100 * numbers['accuracy_decoded']:.2f} %", f"{numbers['encode_s']:.1f}")


TABLES = {f"embeddings-{bits}": Table(embeddings_table(bits), ("banking77",), charged=True) for bits in (1, 2, 4)}
