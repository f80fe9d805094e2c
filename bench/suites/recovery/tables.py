"""The table of recovery: KL of each text and BLiMP, without recovery and with it."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table
from bench.places import DOMAINS
from bench.suite import Line, Table
from bench.suites.recovery.cases import CASES, RecoveryCase

TOLD = {"plain": "none", "scales": "`tersor recover`", "all": "`compress --recover`",
        "long": "the same, 8 passes of all the text"}
TEXTS = {**{text: text for text in DOMAINS}, "house": "these three", "wikitext": "WikiText-2"}
COMPARED = ("house", "wikitext")  # texts whose KL is told in percent of that without recovery, too


def less(before: Line | None, after: Line, text: str) -> str:
    """Return by how much KL fell on a text, in percent; nothing where the case without recovery was not measured."""
    if before is None:
        return ""
    kl, was = (line["numbers"]["texts"][text]["kl"] for line in (after, before))
    return f"{100 * (1 - kl / was):.1f} %"


def row(case: RecoveryCase, line: Line, plain: Line | None) -> list[str]:
    """Return the row of a case beside that of the same model and rate without recovery."""
    numbers = line["numbers"]
    blimp, cells = numbers["blimp"], []
    for text in TEXTS:
        cells.append(f"{numbers['texts'][text]['kl']:.4f}")
        if text in COMPARED:
            cells.append("" if case.how == "plain" else less(plain, line, text))
    return [case.model, f"{case.rate:g}", TOLD[case.how], f"{line['bytes']:,}", *cells,
            f"{100 * blimp['accuracy']:.1f} ± {100 * blimp['error']:.1f}", f"{numbers['processor_s'] / 60:.1f}",
            f"{numbers['peak_bytes'] / 1e9:.1f}"]


def build(found: Mapping[str, Line]) -> str:
    """Return what was measured, a model and rate after the other."""
    heads = []
    for text, name in TEXTS.items():
        heads += [f"KL, {name}", *(["less"] if text in COMPARED else [])]
    body = [row(case, found[case.key], found.get(RecoveryCase(case.model, case.rate, "plain").key))
            for case in CASES if case.key in found]
    return table(["model", "bits", "recovery", "bytes", *heads, "BLiMP, %", "processor, minutes", "peak, GB"], body)


TABLES = {"recovery": Table(build)}
