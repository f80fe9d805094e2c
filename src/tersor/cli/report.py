"""One self-contained HTML page of a compression: what was stored, how far it is from the original."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{padding:3px 10px;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}h1{font-size:22px}h2{font-size:17px;margin-top:2em}
.pictures{display:flex;gap:8px;width:96vw;margin-left:calc(50% - 48vw)}figure{margin:0;flex:1}img{width:100%}"""


def write_html(report: Mapping[str, Any], path: Path) -> Path:
    """Write the report of `compress_model` as HTML with plots inlined; return the path."""
    matrices: Mapping[str, Mapping[str, Any]] = report["matrices"]
    summary, evaluation = report["summary"], report.get("evaluation", {})
    parts = [f"<!doctype html><meta charset=utf-8><title>Tersor report</title><style>{STYLE}</style>",
             "<h1>Tersor report</h1>", _table(summary), "<h2>Against the original</h2>", _table(evaluation),
             "<h2>Bits and error, matrix by matrix</h2>", _plots(matrices), _matrix_table(matrices),
             "<h2>Provenance</h2>", _table(report.get("provenance", {}))]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def image_html(record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the report of a compressed image as one page: its figures, and PNGs by title, side by side."""
    figures = "".join(f"<figure><img alt='{html.escape(title)}' src='data:image/png;base64,"
                      f"{base64.b64encode(png).decode()}'><figcaption>{html.escape(title)}</figcaption></figure>"
                      for title, png in pictures.items())
    return (f"<!doctype html><meta charset=utf-8><title>Tersor image report</title><style>{STYLE}</style>"
            f"<h1>Tersor image report</h1>{_table(record)}<div class=pictures>{figures}</div>\n")


def _cell(value: Any) -> str:
    return html.escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def _table(record: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{_cell(value)}</td></tr>" for key, value in record.items())
    return f"<table>{rows}</table>"


def _matrix_table(matrices: Mapping[str, Mapping[str, Any]]) -> str:
    keys = ("codec", "shape", "nbytes", "rate", "relative_error", "distortion", "sqnr_db", "shannon_gap_db")
    head = "".join(f"<th>{key}</th>" for key in ("matrix", *keys))
    rows = [f"<td>{html.escape(name)}</td>" + "".join(f"<td>{_cell(row[key])}</td>" for key in keys)
            for name, row in matrices.items()]
    return f"<table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table>"


def _plots(matrices: Mapping[str, Mapping[str, Any]]) -> str:
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs

    names = list(matrices)
    rates = go.Figure(go.Bar(x=names, y=[matrices[n]["rate"] for n in names],
                             text=[matrices[n]["codec"] for n in names]))
    rates.update_layout(title="bits per element", height=520, xaxis_showticklabels=len(names) <= 60, margin={"b": 140})
    points = go.Scatter(x=[matrices[n]["rate"] for n in names], y=[matrices[n]["sqnr_db"] for n in names], text=names,
                        mode="markers", name="matrices")
    top = max((matrices[n]["rate"] for n in names), default=1.0)
    bound = go.Scatter(x=[0, top], y=[0, 6.0206 * top], mode="lines", name="Shannon, white Gaussian (6.02 dB a bit)")
    errors = go.Figure([points, bound])
    errors.update_layout(title="signal to noise", xaxis_title="bits per element", yaxis_title="SQNR, dB", height=420)
    figures = [figure.to_html(full_html=False, include_plotlyjs=False) for figure in (rates, errors)]
    return f"<script>{get_plotlyjs()}</script>" + "".join(figures)
