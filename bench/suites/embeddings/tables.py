"""The tables of compressed embeddings and photographs; `tables.py` shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Line = Mapping[str, Any]
HEADS = ("method", "bytes", "bits per element", "relative Frobenius error", "accuracy", "weighted F1",
         "accuracy, decoded queries", "encode, s")
NAMES = {"lplr": "LPLR, as published", "lsvd": "LSVD, as published", "dsvd": "DSVD, as published",
         "original": "uncompressed, float32"}
PREFIXES = {"mm": "NQ, min-max, as published", "fit": "NQ, fitted levels"}


def embeddings_table(bits: int) -> Callable[[Mapping[str, Line]], str]:
    """Return the builder of the table at one rate, least error first, with the original on top."""
    def build(found: Mapping[str, Line]) -> str:
        chosen = [line for line in found.values() if line["case"]["bits"] in (0, bits)]
        chosen.sort(key=lambda line: line["numbers"]["frobenius"])
        rows = [HEADS, ("---", *("---:" for _ in HEADS[1:])), *(_row(line) for line in chosen)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
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
    return (_name(line), f"{line['bytes']:,}", f"{numbers['rate']:.3f}", f"{numbers['frobenius']:.4f}",
            f"{100 * numbers['accuracy_raw']:.2f} %", f"{100 * numbers['f1_raw']:.2f} %",
            f"{100 * numbers['accuracy_decoded']:.2f} %", f"{numbers['encode_s']:.1f}")


def pictures_table(rate: float) -> Callable[[Mapping[str, Line]], str]:
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
        rows = [("PSNR, dB", *layouts), ("---", *("---:" for _ in layouts)), *body]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return build
