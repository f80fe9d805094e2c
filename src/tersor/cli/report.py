"""One self-contained HTML page of a compression: what was stored, how far it is from the original, how to load it."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.cli.charts import Scale, bars, heat_map, legend
from tersor.files import whole

Matrices = Mapping[str, Mapping[str, Any]]

STYLE = """:root{color-scheme:light dark;--ink:#1d1f23;--page:#fff;--line:#d5d8dd;--soft:#f2f3f5;--bar:#4a6fa5}
@media (prefers-color-scheme:dark){:root{--ink:#e4e6ea;--page:#17191d;--line:#3b3f47;--soft:#22252b;--bar:#7fa3d6}}
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:var(--ink);
background:var(--page)}h1{font-size:22px}h2{font-size:17px;margin-top:2em}h3{font-size:14px;margin:1.2em 0 .3em}
.lead{font-size:18px}.wide{overflow-x:auto}.maps{display:flex;flex-wrap:wrap;gap:1.5em}
table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{padding:3px 10px;border-bottom:1px solid var(--line);
text-align:right;vertical-align:top}td:first-child,th:first-child,.words td,.words th{text-align:left}
pre{background:var(--soft);padding:.8em 1em;overflow-x:auto}svg{font:11px ui-monospace,monospace;display:block}
.ink{fill:var(--ink)}.bar{fill:var(--bar)}ins{text-decoration:none;background:var(--soft)}
.pictures{display:flex;gap:8px;width:96vw;margin-left:calc(50% - 48vw)}figure{margin:0;flex:1}img{width:100%}"""
COLUMNS = {"codec": "codec", "shape": "shape", "nbytes": "bytes", "rate": "bits", "relative_error": "relative error",
           "distortion": "distortion", "sqnr_db": "SQNR, dB", "shannon_gap_db": "to Shannon, dB"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a model a matrix lies, by its name alone.

    Attributes
    ----------
    stack : str
        What comes before the first number, such as `model.layers`; empty where the name has no number.
    row : str
        That number: the layer. The name itself where there is none.
    kind : str
        What comes after, without `.weight`; further numbers, such as of experts, are stars.
    """

    stack: str
    row: str
    kind: str


def place_of(name: str) -> Place:
    """Return where a matrix lies."""
    parts = name.removesuffix(".weight").replace("/", ".").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return Place("", ".".join(parts), "")
    kind = ".".join("*" if part.isdigit() else part for part in parts[number + 1 :])
    return Place(".".join(parts[:number]), parts[number], kind or "weight")


def write_html(report: Mapping[str, Any], path: Path, lead: str, load: str) -> Path:
    """Write the report of `compress_model` as HTML; return the path.

    Parameters
    ----------
    lead : str
        The sentence that the page opens with.
    load : str
        Python that loads the model.
    """
    body = [f'<p class="lead">{html.escape(lead)}</p>', "<h2>Bits and error, layer by layer</h2>",
            _maps(report["matrices"]), "<h2>Size by part</h2>", _sizes(report),
            _samples(report.get("samples", ())), f"<h2>How to load it</h2><pre>{html.escape(load)}</pre>",
            "<h2>Figures</h2>", _table({**report["summary"], **report.get("evaluation", {})}),
            _ledger(report.get("ledger", {}), report.get("left_dense", {})),
            "<h2>Matrices</h2>", _matrix_table(report["matrices"]),
            "<h2>Provenance</h2>", _table(report.get("provenance", {}))]
    with whole(path) as partial:
        partial.write_text(_page("Tersor report", body), encoding="utf-8")
    return path


def image_html(record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the report of a compressed image as one page: its figures, and PNGs by title, side by side."""
    figures = "".join(f"<figure><img alt='{html.escape(title)}' src='data:image/png;base64,"
                      f"{base64.b64encode(png).decode()}'/><figcaption>{html.escape(title)}</figcaption></figure>"
                      for title, png in pictures.items())
    return _page("Tersor image report", [_table(record), f'<div class="pictures">{figures}</div>'])


def _page(title: str, body: Sequence[str]) -> str:
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
            '<meta name="viewport" content="width=device-width"/>'
            f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(body) + "\n</body></html>\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int else html.escape(str(value))


def _table(record: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{_cell(value)}</td></tr>" for key, value in record.items())
    return f"<table>{rows}</table>"


def _matrix_table(matrices: Matrices) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for title in ("matrix", *COLUMNS.values()))
    rows = [f"<td>{html.escape(name)}</td>" + "".join(f"<td>{_figure(key, row[key])}</td>" for key in COLUMNS)
            for name, row in matrices.items()]
    lines = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def _figure(key: str, value: Any) -> str:
    if key == "shape":
        return " × ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else _cell(value)


def _maps(matrices: Matrices) -> str:
    """Return two heat maps of each stack of layers: bits, and error in percent of the matrix's norm."""
    bits = Scale.over((row["rate"] for row in matrices.values()), unit="bits per element")
    errors = Scale.over((_percent(row) for row in matrices.values()), logarithmic=True, digits=".3g",
                        unit="error, % of the matrix's norm")
    stacks: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in matrices:
        place = place_of(name)
        stacks[place.stack][place.row, place.kind].append(name)
    parts = [f"<p>Further down is a table of the same numbers.</p>{legend(bits)}{legend(errors)}"]
    for stack, cells in stacks.items():
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = list(dict.fromkeys(column for _, column in cells))
        maps = [heat_map(f"{scale.unit}: {stack or 'outside the layers'}", rows, columns,
                         {cell: _mean(matrices, names, scale, error=scale is errors) for cell, names in cells.items()},
                         scale) for scale in (bits, errors)]
        title = html.escape(stack or "Outside the layers")
        parts.append(f'<h3>{title}</h3><div class="maps">' + "".join(
            f'<div class="wide">{scale.unit}{drawn}</div>' for scale, drawn in zip((bits, errors), maps, strict=True))
            + "</div>")
    return "\n".join(parts)


def _percent(row: Mapping[str, Any]) -> float:
    """Return the norm of the error, in percent of the matrix's norm."""
    return 100 * math.sqrt(max(0.0, row["relative_error"]))


def _mean(matrices: Matrices, names: Sequence[str], scale: Scale, *, error: bool) -> tuple[float, str]:
    """Return a cell: the mean over the matrices in it, bits weighed by elements, and its title."""
    rows = [matrices[name] for name in names]
    if error:
        value = 100 * math.sqrt(sum(max(0.0, row["relative_error"]) for row in rows) / len(rows))
    else:
        value = 8 * sum(row["nbytes"] for row in rows) / sum(row["shape"][0] * row["shape"][1] for row in rows)
    what = names[0] if len(names) == 1 else f"mean of {len(names)} matrices such as {names[0]}"
    codecs = ", ".join(list(dict.fromkeys(row["codec"] for row in rows))[:3])
    return value, f"{what}: {scale.text(value)} {scale.unit}; {codecs}"


def _sizes(report: Mapping[str, Any]) -> str:
    """Return the bytes of every kind of matrix, over all layers, and of what is no matrix."""
    sizes: dict[str, int] = defaultdict(int)
    for name, row in report["matrices"].items():
        place = place_of(name)
        sizes[f"{place.stack}.*.{place.kind}" if place.stack else place.row] += row["nbytes"]
    total = report["summary"]["bytes"]
    sizes = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    sizes["norms, biases, headers, manifest"] = max(0, total - sum(sizes.values()))
    told = {name: f"{size:,} bytes, {100 * size / max(1, total):.1f} %" for name, size in sizes.items()}
    return f'<div class="wide">{bars("Bytes by part", sizes, told)}</div>'


def _ledger(ledger: Mapping[str, Mapping[str, Any]], left_dense: Mapping[str, str]) -> str:
    """Return what became of the checkpoint's tensors: sums by fate, and by name those that are not simply stored."""
    if not ledger:
        return ""
    fates: dict[str, list[int]] = defaultdict(list)
    for line in ledger.values():
        fates[line["fate"]].append(line["bytes"])
    rows = "".join(f"<tr><td>{html.escape(fate)}</td><td>{len(sizes):,}</td><td>{sum(sizes):,}</td></tr>"
                   for fate, sizes in fates.items())
    told = {name: f"{line['fate']} {line.get('note', '')}".strip() for name, line in ledger.items()
            if line["fate"] not in ("compressed", "kept")}
    told |= {name: f"left dense, because {why}" for name, why in left_dense.items()}
    named = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in told.items())
    listed = f"<details><summary>Those that are a case apart</summary><ul>{named}</ul></details>" if named else ""
    head = "".join(f'<th scope="col">{title}</th>' for title in ("fate", "tensors", "bytes in the checkpoint"))
    return ("<h2>What became of the checkpoint's tensors</h2>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{listed}")


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return how both models go on from the same words, side by side."""
    if not samples:
        return ""
    rows = "".join(f"<tr><td>{html.escape(one['prompt'])}</td><td><ins>{html.escape(one['original'])}</ins></td>"
                   f"<td><ins>{html.escape(one['compressed'])}</ins></td><td>{one['agree']}</td></tr>"
                   for one in samples)
    head = "".join(f'<th scope="col">{title}</th>' for title in ("prompt", "original", "compressed",
                                                               "tokens until they part"))
    return ("<h2>How both go on</h2><p>Greedy: the most likely token each time.</p>"
            f'<table class="words"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>')
