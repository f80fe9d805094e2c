"""Markdown tables from bench/results/*.jsonl, spliced between `<!-- bench:NAME -->` and `<!-- /bench -->`.

`tables.py` prints them all, `--write` updates README.md and docs/, `--check` fails if any is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cases
import common
import coupled_tables
import gpu_tables
import kashin_tables
import kv_tables
import low_rank_tables
import lplr_tables
import rom_tables
import two_basis_tables
from embedding_tables import embeddings_table, pictures_table
from vector_tables import vectors_table

Line = Mapping[str, Any]
Builder = Callable[[Mapping[str, Line]], str]
MARKER = re.compile(r"(<!-- bench:(?P<name>[\w.-]+) -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
PEER_NAMES = {"nf4": "bitsandbytes NF4, block", "hqq": "HQQ", "quanto": "quanto", "torchao": "torchao", "gguf": "GGUF",
              "faiss": "FAISS"}


def label(method: str) -> str:
    """Return how a table names a method."""
    head, _, rest = method.partition(":")
    if method == "original":
        return "original, bf16"
    if head == "pipeline":
        return f"**Tersor**, calibrated and planned{f', `{rest}`' if rest else ''}"
    if method.startswith("tersor:qet@"):
        return "QET as published, plain"
    if head == "tersor":
        return f"**Tersor** `{rest.split('@')[0]}`, plain"
    if rest:
        words = re.sub(r"^(\d+)g(\d+)(\w*)$", r"\1-bit, group \2 \3", rest).strip()
        words = re.sub(r"^eden(\d)$", r"EDEN \1-bit", words).replace(" hqq", ", HQQ optimizer")
        return f"{PEER_NAMES[head]} {words.upper() if words == 'sq4' else words}"
    if method.startswith("rtn"):
        bits, group = method.removeprefix("rtn").split("g")
        return f"round to nearest {bits}-bit, group {group}"
    return f"**Tersor** `{method}`" if method.startswith("rot,") else f"Tersor `{method}`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; every column but the first is right-aligned."""
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def provenance(lines: Iterable[Line]) -> str:
    """Return one line that says where and when figures were measured."""
    held = list(lines)
    last = max(held, key=lambda line: line["date"])
    machine = last["machine"]
    commits = sorted({line["commit"] for line in held})
    days = sorted({line["date"][:10] for line in held})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (f"Measured {when} at commit {', '.join(f'`{c}`' for c in commits)} on {machine['cpu']}, {threads}, "
            f"torch {last['versions']['torch']}; seed {last['seed']}.")


def gaussian_table(methods: Mapping[int, Sequence[str]]) -> Builder:
    """Return the table of some methods' relative squared error on three kinds of matrix."""
    def build(found: Mapping[str, Line]) -> str:
        rows = []
        for bits, chosen in methods.items():
            block = []
            for method in chosen:
                lines = [found.get(cases.MatrixCase(kind, method, bits).key) for kind in cases.DATA_TOLERANCE]
                if any(line is None for line in lines):
                    continue
                numbers = [line["numbers"] for line in lines if line is not None]
                block.append((numbers[0]["rate"], [
                    label(method), f"{numbers[0]['rate']:.3f}", *(f"{n['relative_mse']:.4f}" for n in numbers),
                    f"{numbers[0]['shannon_gap_db']:.2f}"]))
            rows += [row for _, row in sorted(block, key=lambda pair: pair[0])]
        return table(["method", "bits per element", "Gaussian", "Student t, 3 d.o.f.", "outlier columns",
                      "dB to Shannon (Gaussian)"], rows)
    return build


def targets_table(found: Mapping[str, Line]) -> str:
    """Rotation + Lloyd-Max against its targets."""
    rows = []
    for case in cases.MATRIX_CASES:
        line = found.get(case.key)
        if case.target is None or line is None:
            continue
        numbers = line["numbers"]
        off = 100 * (numbers["relative_mse"] / case.target - 1)
        rows.append([f"`{case.method}`, {case.data}", f"{numbers['rate']:.4f}", f"{numbers['relative_mse']:.5f}",
                     f"{case.target}", f"{off:+.2f} %", f"{100 * case.tolerance:.0f} %",
                     "pass" if numbers["passed"] else "**fail**"])
    return table(["case", "bits per element", "relative MSE", "target", "above", "allowed", ""], rows)


def models_table(model: str, *, short: bool = False) -> Builder:
    """Return the table of one model: peers use as many bytes as Tersor's rows above them, or more.

    The short one has one perplexity, over all texts together.
    """
    def build(found: Mapping[str, Line]) -> str:
        lines = [line for line in found.values() if line["case"]["model"] == model]
        lines.sort(key=lambda line: (line["case"]["method"] != "original", line["case"]["rate"], line["bytes"],
                                     line["key"]))
        texts = ("all",) if short else common.DOMAINS
        ours: dict[int, int] = {}  # the most bytes of a Tersor row, by block
        for line in lines:
            if label(line["case"]["method"]).startswith("**Tersor**"):
                ours[line["case"]["rate"]] = max(line["bytes"], ours.get(line["case"]["rate"], 0))
        rows = []
        for line in lines:
            numbers = line["numbers"]
            name = label(line["case"]["method"])
            fewer = " (fewer bytes)" if "**" not in name and line["bytes"] < ours.get(line["case"]["rate"], 0) else ""
            perplexities = [f"{numbers[text]['perplexity']:.2f}" for text in texts]
            rows.append([name + fewer, f"{line['bytes']:,}", f"{numbers['rate']:.3f}", *perplexities,
                         f"{numbers['all']['kl']:.4f}", f"{100 * numbers['all']['top1']:.1f} %"])
        heads = ["perplexity"] if short else [f"perplexity, {text}" for text in texts]
        return table(["method", "bytes", "bits per parameter", *heads, "KL, nats", "same top token"], rows)
    return build


def speed_table(found: Mapping[str, Line]) -> str:
    """Encode and decode as multiples of a copy of the matrix."""
    rows = []
    for case in cases.SPEED_CASES:
        line = found.get(case.key)
        if line is None or case.most is None:
            continue
        rows.append([f"{case.operation} `{case.method}`", f"{line['numbers']['ratio']:.1f}", f"{case.most:g}",
                     "pass" if line["numbers"]["passed"] else "**fail**"])
    return table([f"operation, {cases.SPEED_CASES[0].size} x {cases.SPEED_CASES[0].size} float32", "x copy", "at most",
                  ""], rows)


def packing_table(found: Mapping[str, Line]) -> str:
    """Packing and unpacking by number of levels, as multiples of a copy of the float32 matrix."""
    ratios: dict[str, dict[str, str]] = {}
    for case in cases.SPEED_CASES:
        line = found.get(case.key)
        if line is not None and case.operation in ("pack", "unpack"):
            ratios.setdefault(case.method, {})[case.operation] = f"{line['numbers']['ratio']:.2f}"
    return table(["levels", "pack, x copy", "unpack, x copy"],
                 [[levels, of.get("pack", ""), of.get("unpack", "")] for levels, of in ratios.items()])


def memory_table(found: Mapping[str, Line]) -> str:
    """Peak memory of encoding, above importing torch."""
    rows = []
    for case in cases.MEMORY_CASES:
        line = found.get(case.key)
        if line is None:
            continue
        numbers = line["numbers"]
        rows.append([f"`{case.method}`, {case.rows} x {case.columns}", f"{numbers['dense_bytes'] / 1e6:.0f}",
                     f"{numbers['peak_bytes'] / 1e6:.0f}", f"{numbers['limit_bytes'] / 1e6:.0f}",
                     "pass" if numbers["passed"] else "**fail**"])
    return table(["encoding", "matrix, MB", "peak, MB", "at most, MB", ""], rows)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A matrix at a rate: normalized MSE by method, NaN where a method was not measured or cannot run."""

    data: str
    bits: int
    errors: Mapping[str, float]

    def best(self, methods: Iterable[str]) -> float:
        """Return the least error of some methods."""
        known = [self.errors[method] for method in methods if not math.isnan(self.errors[method])]
        return min(known, default=math.nan)

    @property
    def ours(self) -> float:
        """The error of `qet_plus`."""
        return self.errors["tersor:qet_plus"]

    @property
    def qet(self) -> float:
        """The least error of a published form, its swaps included."""
        return self.best(cases.GRID_QET)

    @property
    def house(self) -> float:
        """The least error of the codecs that the house had."""
        return self.best(cases.GRID_HOUSE)


def grid_cells(found: Mapping[str, Line]) -> list[Cell]:
    """Return the cells of the QET grid of which anything was measured."""
    cells = []
    for data in cases.GRID_DATA:
        for bits in cases.GRID_BITS:
            lines = {method: found.get(cases.GridCase(data, bits, method).key) for method in cases.GRID_METHODS}
            held = {method: line["numbers"]["nmse"] if line else None for method, line in lines.items()}
            if any(lines.values()):
                cells.append(Cell(data, bits, {method: math.nan if error is None else error
                                               for method, error in held.items()}))
    return cells


GRID_COLUMNS = {"Lloyd-Max, std": ("standardized_lm",), "rot, Lloyd-Max": ("tersor:rotated_scalar",),
                "house, other": ("tersor:scalar", "tersor:uniform"), "PQ": ("pq",), "PQ + residual": ("pq_residual",),
                "FAISS PQ": ("faiss:pq",), "OPQ": ("faiss:opq",), "RQ": ("faiss:rq",), "LSQ": ("faiss:lsq",),
                "best QET": cases.GRID_QET, "**`qet_plus`**": ("tersor:qet_plus",)}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}" if value >= 0.01 else f"{value:.5f}"


def grid_table(found: Mapping[str, Line]) -> str:
    """The QET grid: normalized MSE at equal total bytes, and `qet_plus` as a fraction of what it must beat."""
    rows = []
    for cell in grid_cells(found):
        against = (cell.ours / cell.qet, cell.ours / cell.house)
        rows.append([f"{cell.data}, {cell.bits} bits", *(_number(cell.best(names)) for names in GRID_COLUMNS.values()),
                     *("" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in against)])
    return table(["nMSE", *GRID_COLUMNS, "/ best QET", "/ best of the house"], rows)


def reproduction_table(found: Mapping[str, Line]) -> str:
    """The figures of QET's released code and of its theory, beside the transcription's and Tersor's."""
    rows: dict[str, dict[str, Line]] = {}
    for line in found.values():
        case = line["case"]
        estimate = f" ({case['implementation']})" if case["check"] == "penalty" else ""
        name = f"{case['check'].replace('_', ' ')}{estimate}, {case['data']}, {case['method']}"
        rows.setdefault(name, {})["tersor" if case["implementation"] == "tersor" else "transcription"] = line
    body = []
    for name, lines in rows.items():
        one = next(iter(lines.values()))
        shown = [lines[column]["numbers"].get("shown") or f"{lines[column]['numbers']['value']:.4g}"
                 if column in lines else "" for column in ("transcription", "tersor")]
        target, judged = one["case"]["target"], [line["numbers"]["passed"] for line in lines.values()]
        body.append([name, "" if target is None or one["case"]["check"] == "order" else f"{target:g}", *shown,
                     f"{100 * one['case']['tolerance']:g} %" if one["case"]["tolerance"] else "",
                     "" if target is None else "pass" if all(judged) else "**fail**"])
    return table(["check", "published", "transcription", "Tersor", "allowed", ""], body)


def candidates_table(found: Mapping[str, Line]) -> str:
    """The candidates for a better QET: error relative to the variance, and bits an element, by matrix."""
    chosen = [line for line in found.values() if "nmse" in line["numbers"]]
    data = list(dict.fromkeys(line["case"]["data"] for line in chosen))
    rows: dict[str, dict[str, Line]] = {}
    for line in chosen:
        rows.setdefault(line["case"]["candidate"], {})[line["case"]["data"]] = line
    body = [[name, *(f"{of[d]['numbers']['nmse']:.4f} ({of[d]['numbers']['rate']:.2f})" if d in of else ""
                     for d in data)] for name, of in rows.items()]
    return table(["error (bits an element)", *data], body)


TABLES: Mapping[str, tuple[str, str, Builder]] = {
    "gaussian": ("gaussian", "", gaussian_table(cases.SHORT_METHODS)),
    "gaussian-all": ("gaussian", "", gaussian_table(cases.MATRIX_METHODS)),
    "gaussian-targets": ("gaussian", "", targets_table),
    "models": ("models", "fable-22m|", models_table("fable-22m", short=True)),
    **{f"models-{name}": ("models", f"{name}|", models_table(name)) for name in (*cases.MODELS, "smollm2-135m")},
    "speed": ("speed", "encode|decode|", speed_table),
    "packing": ("speed", "pack|unpack|", packing_table),
    "memory": ("speed", "memory|", memory_table),
    "vectors-glove-2": ("vectors", "glove|", vectors_table("glove", 2)),
    "vectors-glove-4": ("vectors", "glove|", vectors_table("glove", 4)),
    "vectors-banking77": ("vectors", "banking77|", vectors_table("banking77", 2)),
    **{f"embeddings-{bits}": ("embeddings", "banking77|", embeddings_table(bits)) for bits in (1, 2, 4)},
    **{f"pictures-{rate}": ("pictures", "", pictures_table(rate)) for rate in (1, 2)},
    "qet-candidates": ("qet_candidates", "candidate|", candidates_table),
    "qet-grid": ("qet", "grid|", grid_table),
    "qet-reproduction": ("qet", "reproduction|", reproduction_table),
    **{f"lplr-plus-{bits}": ("lplr_plus", "error|", low_rank_tables.errors(bits)) for bits in (1, 2)},
    "lplr-plus-time": ("lplr_plus", "time|", low_rank_tables.times),
    "lplr-plus-growth": ("lplr_plus", "growth|", low_rank_tables.growth),
    "low-rank-layers": ("low_rank_layers", "", low_rank_tables.layers),
    "low-rank-models": ("low_rank_models", "", low_rank_tables.models),
    "lplr-reproduction": ("lplr", "reproduction|", lplr_tables.reproduction_table),
    "coupled": ("coupled", "", lambda found: table(coupled_tables.HEADER, coupled_tables.rows(found))),
    "kashin-reproduction": ("kashin", "reproduction|", kashin_tables.reproduction_table),
    "two-basis": ("two_basis", "", two_basis_tables.table),
    **{f"kv-{name}": ("kv", "quality|", kv_tables.quality(name)) for name in ("fable-22m", "smollm2-135m")},
    "kv-verdict": ("kv", "quality|", kv_tables.verdicts), "kv-claim": ("qet", "reproduction|grid|", kv_tables.claim),
    "kv-needle": ("kv", "needle|", kv_tables.needle), "kv-speed": ("kv", "speed|", kv_tables.speed),
    **gpu_tables.TABLES, **rom_tables.TABLES,
}
"""Name to the suite, the prefixes of the keys it shows (each ends in a bar; none: all), and what builds it."""


def render(name: str) -> str:
    """Return a table and its provenance.

    Raises
    ------
    LookupError
        If no table is called so, or nothing was measured for it.
    """
    if name not in TABLES:
        raise LookupError(f"no table 'bench:{name}'; known: {', '.join(TABLES)}")
    suite, prefixes, build = TABLES[name]
    starts = tuple(f"{prefix}|" for prefix in prefixes.split("|") if prefix) or ("",)
    found = {key: line for key, line in common.newest(suite).items() if key.startswith(starts)}
    if not found:
        raise LookupError(f"no results for 'bench:{name}'; run the suite '{suite}' first")
    return f"{build(found)}\n\n{provenance(found.values())}\n"


def documents() -> list[Path]:
    """Return the files that may hold tables."""
    return [common.ROOT / "README.md", *sorted((common.ROOT / "docs").rglob("*.md"))]


def splice(text: str) -> str:
    """Return `text` with every marked table rendered anew."""
    return MARKER.sub(lambda match: match[1] + render(match["name"]), text)


def update(*, write: bool) -> list[Path]:
    """Return the documents with stale tables, relative to the root; rewrite them if asked to.

    Raises
    ------
    LookupError
        If a document asks for a table that cannot be rendered; names the document.
    """
    stale = []
    for file in documents():
        if not file.is_file():
            continue
        text = file.read_text()
        try:
            fresh = splice(text)
        except LookupError as error:
            raise LookupError(f"{file.relative_to(common.ROOT)}: {error.args[0]}") from error
        if fresh != text:
            stale.append(file.relative_to(common.ROOT))
            if write:
                file.write_text(fresh)
    return stale


def main() -> int:
    """Print, write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="update README.md and docs/**/*.md")
    group.add_argument("--check", action="store_true", help="exit with status 1 if a table is stale")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        for name in TABLES:
            try:
                print(f"## {name}\n\n{render(name)}")
            except LookupError as error:
                print(f"## {name}\n\n{error}\n")
        return 0
    try:
        stale = update(write=arguments.write)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    for file in stale:
        print(f"{'updated' if arguments.write else 'stale'}: {file}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
