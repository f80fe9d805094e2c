"""Tables of the improved low-rank codes: the ladder of improvements, time, layers of models, models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.markdown import table, verdict
from bench.suite import Builder, Line, Table

STEPS = {"lplr": "LPLR, the best of six equal widths", "basis": "singular vectors, Lloyd-Max, a scale a component",
         "rounds": "+ alternating rounds and feedback", "allocation": "widths by energy instead, symmetric codebooks",
         "both": "+ rounds and feedback: `lplr_plus`", "rotation": "+ rotation of both sides",
         "family": "**family `low_rank`**", "bound": "two ideally coded factors"}


def _cells(found: Mapping[str, Line], prefix: str) -> dict[tuple[Any, ...], Line]:
    return {tuple(key.split("|")[1:]): line for key, line in found.items() if key.startswith(f"{prefix}|")}


def errors(bits: int) -> Builder:
    """Return the builder of the table of errors at a rate."""
    def build(found: Mapping[str, Line]) -> str:
        cells = {key: line for key, line in _cells(found, "error").items() if key[1] == str(bits)}
        names = list(dict.fromkeys(key[0] for key in cells))
        body = [[label, *(f"{cells[name, str(bits), step]['numbers']['error']:.4f}" for name in names)]
                for step, label in STEPS.items()]
        final = [cells[name, str(bits), "family"] for name in names]
        marks = ["" if line["numbers"]["passed"] else " **missed**" for line in final]
        body.append(["target", *(f"{line['case']['target']:.4g}{mark}"
                                 for line, mark in zip(final, marks, strict=True))])
        body.append(["chosen", *(f"`{line['numbers']['codec']}`" for line in final)])
        return table([f"relative error at {bits} bit{'s' if bits > 1 else ''}", *names], body)
    return build


def times(found: Mapping[str, Line]) -> str:
    """Return encoding times beside LPLR and LSVD."""
    body = [[side, method, f"{n['over_lplr']:.2f}", f"{n['over_lsvd']:.2f}", f"{n['error']:.4f}",
             verdict(n["passed"], "**missed**")]
            for (side, method), line in _cells(found, "time").items() for n in (line["numbers"],)]
    return table(["n = d", "encoder", "time over LPLR", "over LSVD", "error", ""], body)


def growth(found: Mapping[str, Line]) -> str:
    """Return time and memory over the side of a matrix in a file."""
    body = [[side, mode, f"{n['nanoseconds_ndm']:.2f}", f"{n['extra_megabytes']:.0f}", f"{n['matrix_megabytes']:.0f}"]
            for (side, _, mode), line in _cells(found, "growth").items() for n in (line["numbers"],)]
    return table(["n = d, rank 128", "encoder", "ns per n d m", "MiB beside the file", "MiB of the file"], body)


def layers(found: Mapping[str, Line]) -> str:
    """Return errors over the layers of models."""
    body = [[line["case"]["model"], line["case"]["method"], f"{n['rate']:.3f}", f"{n['mean']:.3f} ± {n['spread']:.3f}",
             f"{n['worst']:.3f}", str(n["layers"])] for line in found.values() for n in (line["numbers"],)]
    return table(["model", "method", "bits per element", "relative error", "worst layer", "layers"], body)


def models(found: Mapping[str, Line]) -> str:
    """Return perplexity and KL of models with and without a low-rank part."""
    body = [[line["case"]["model"], line["case"]["method"], f"{n['rate']:.3f}", str(line["bytes"]),
             f"{n['results']['all']['perplexity']:.2f}", f"{n['results']['all']['kl']:.4f}"]
            for line in found.values() for n in (line["numbers"],)]
    return table(["model", "method", "bits per parameter", "bytes", "perplexity", "KL"], body)


PLUS = {**{f"lplr-plus-{bits}": Table(errors(bits), ("error",)) for bits in (1, 2)},
        "lplr-plus-time": Table(times, ("time",)), "lplr-plus-growth": Table(growth, ("growth",))}
LAYERS = {"low-rank-layers": Table(layers)}
MODELS = {"low-rank-models": Table(models)}
