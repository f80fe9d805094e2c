"""The tables of vector sets."""

from __future__ import annotations

from collections.abc import Mapping

from bench.charges import charged
from bench.markdown import table
from bench.suite import Builder, Line, Table
from bench.suites.vectors.cases import CELLS

SPARE = 0.125  # bits a number that a code with its tables may have beyond a cell's: codes come in steps
HEADS = ("method", "bytes a vector", "tables included", "recall@10", "relative MSE", "queries/s, batch",
         "queries/s, single", "train, s", "encode, s")


def vectors_table(data: str, bits: float) -> Builder:
    """Return the builder of the table of one set at one rate, best recall first."""
    def build(found: Mapping[str, Line]) -> str:
        chosen = [line for line in found.values() if (line["case"]["data"], line["case"].get("bits")) == (data, bits)]
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
    if engine == "tersor":
        chosen = f", by `{line['case']['method'].removeprefix('tersor:')}`" if "auto" in line["case"]["method"] else ""
        return f"**Tersor** `{method}{codec}`{chosen}"
    return f"FAISS {codec.removesuffix('np')}" if engine == "faiss" else f"{engine} {codec}"


def _row(line: Line) -> tuple[str, ...]:
    numbers = line["numbers"]
    total = charged(line) / numbers["vectors"]
    return (_name(line), f"{numbers['stored_bytes']:.4g}", f"{total:.4g}", f"{numbers['recall']:.3f}",
            f"{numbers['relative_mse']:.4f}" if "relative_mse" in numbers else "", f"{numbers['queries_per_s']:.0f}",
            f"{numbers['single_queries_per_s']:.0f}", f"{numbers['train_s']:.1f}", f"{numbers['encode_s']:.1f}")


def cells_table(found: Mapping[str, Line]) -> str:
    """Return the best recall of both at each cell; bytes are a vector's share of all that is stored."""
    rows = []
    for data, bits in CELLS:
        best = {}
        for line in found.values():
            case, numbers = line["case"], line["numbers"]
            if (case.get("data"), case.get("bits")) != (data, bits) or "recall" not in numbers:
                continue
            engine = "tersor" if case["method"].startswith("tersor:") else "others"
            fits = 8 * charged(line) / numbers["vectors"] <= (bits + SPARE) * numbers["dim"]
            if fits and (engine not in best or numbers["recall"] > best[engine]["numbers"]["recall"]):
                best[engine] = line
        if len(best) == 2:
            ours, theirs = (best[engine]["numbers"]["recall"] for engine in ("tersor", "others"))
            sizes = (f"{charged(best[engine]) / best[engine]['numbers']['vectors']:.4g}" for engine in best)
            named = dict(zip(best, sizes, strict=True))
            rows.append((data, str(bits), _name(best["tersor"]), named["tersor"], f"{ours:.3f}", _name(best["others"]),
                         named["others"], f"{theirs:.3f}", f"{ours - theirs:+.3f}"))
    return table(("data", "bits", "of Tersor", "bytes", "recall@10", "of others", "bytes", "recall@10", "more"), rows)


def million_table(found: Mapping[str, Line]) -> str:
    """Return what a million vectors take, and recall and queries a second by the lists that are looked into."""
    rows = []
    for line in found.values():
        numbers = line["numbers"]
        probes = [int(name.rpartition("_")[2]) for name in numbers if name.startswith("recall_")]
        rows.append((_name(line), f"{line['bytes'] / numbers['vectors']:.1f}", f"{numbers['clock_s']:.0f}",
                     f"{numbers['processor_s']:.0f}", f"{line['machine']['load']:.1f}",
                     f"{numbers['peak_bytes'] / 1e9:.2f}",
                     *(f"{numbers[f'recall_{n}']:.3f}, {numbers[f'queries_per_s_{n}']:.0f}" for n in probes)))
    heads = ("method", "bytes a vector", "build, s", "of the processor", "load after", "peak, GB",
             "1 list: recall, queries/s", "4", "16", "64")
    return table(heads, rows)


def single_table(found: Mapping[str, Line]) -> str:
    """Return what one query takes, the fastest method first, beside the fastest of FAISS."""
    (line,) = found.values()
    methods = line["numbers"]["methods"]
    fastest = min(one["single_ms"] for name, one in methods.items() if name.startswith("faiss:"))
    names = {name: f"**Tersor** `{one['codec']}`" if name.startswith("tersor:") else
             f"FAISS {one['codec'].removesuffix('np')}" for name, one in methods.items()}
    rows = [(names[name], str(one["code_bytes"]), f"{one['recall']:.3f}", f"{one['single_ms']:.3f}",
             f"{one['single_least_ms']:.3f}", f"{fastest / one['single_ms']:.2f}", f"{one['batch_ms']:.3f}")
            for name, one in sorted(methods.items(), key=lambda item: item[1]["single_ms"])]
    heads = ("method", "bytes a code", "recall@10", "one query, ms", "of ten the least", "speed, FAISS' fastest 1",
             "in a batch, ms")
    return table(heads, rows)


def gpu_table(found: Mapping[str, Line]) -> str:
    """Return queries a second on a GPU by batch, beside dense vectors of the same set."""
    rows = []
    for line in found.values():
        numbers, count = line["numbers"], line["numbers"]["vectors"]
        name = line["case"]["method"].replace("tersor:", "**Tersor** ").replace(":", " ")
        speeds = (f"{numbers[f'queries_per_s_{batch}']:.0f}" for batch in (1, 64, 1024))
        rows.append((line["case"]["data"], name, f"{line['bytes'] / count:.1f}",
                     f"{numbers['device_bytes'] / count:.1f}", f"{numbers['recall']:.3f}", *speeds,
                     f"{numbers['busy_ms_1024']:.2f}", f"{numbers['build_s']:.1f}"))
    heads = ("set", "method", "bytes a vector", "on the device", "recall@10", "queries/s, 1 at a time", "64", "1,024",
             "of 1,024: kernels, ms", "build, s")
    return table(heads, rows)


ON_GPU = {"vectors-gpu": Table(gpu_table)}
TABLES = {
    "vectors-single": Table(single_table, ("single",)),
    "vectors-cells": Table(cells_table, tuple(dict.fromkeys(data for data, _ in CELLS)), charged=True),
    "vectors-million": Table(million_table, ("million",), charged=True),
    "vectors-glove-2": Table(vectors_table("glove", 2), ("glove",), charged=True),
    "vectors-glove-4": Table(vectors_table("glove", 4), ("glove",), charged=True),
    "vectors-sentences": Table(vectors_table("sentences", 2), ("sentences",), charged=True),
    "vectors-banking77": Table(vectors_table("banking77", 2), ("banking77",), charged=True),
}
