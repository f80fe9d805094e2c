"""Points of recall and speed as a picture: SVG as reports draw it, PNG by matplotlib where it is installed."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from pathlib import Path

from tersor.cli.charts import scatter
from tersor.errors import CodecConfigError

KINDS = (".svg", ".png")


def check_plot(place: Path) -> None:
    """Raise `CodecConfigError` unless a picture can be drawn for a file of this name."""
    if place.suffix not in KINDS:
        raise CodecConfigError(f"--plot: expected a file as {' or '.join(KINDS)}, found '{place}'")
    if place.suffix == ".png":
        try:
            importlib.import_module("matplotlib")
        except ModuleNotFoundError as error:
            raise CodecConfigError(f"--plot: {place}: PNG needs the package matplotlib: pip install matplotlib, or "
                                   "name a file .svg") from error


def plotted(place: Path, title: str, across: str, up: str, points: Mapping[str, tuple[float, float]]) -> bytes:
    """Return the picture of points by name, (x, y): x from 0 to 1, and y, positive, on a logarithmic axis.

    Parameters
    ----------
    place : Path
        Its suffix says the kind of picture.
    across, up : str
        What the axes are.
    """
    if place.suffix == ".svg":
        return scatter(f"{title}: {across} against {up}", points).encode()
    axes = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 5)).subplots()
    for name, (x, y) in points.items():
        axes.scatter([x], [y], marker="s" if name.startswith("FAISS") else "o", label=f"{name}: {x:.3f}, {y:.0f}")
    axes.set(title=title, xlabel=across, ylabel=up, xlim=(0, 1.02), yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    out = io.BytesIO()
    axes.figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()
