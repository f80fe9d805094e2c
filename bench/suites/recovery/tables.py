"""The table of recovery: KL of each text and BLiMP, without recovery and with it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from bench.markdown import table
from bench.places import DOMAINS
from bench.suite import Line, Table
from bench.suites.recovery.cases import BESIDE, BLOCKS, CASES, BesideCase, RecoveryCase

TOLD = {"plain": "none", "scales": "`tersor recover`", "blocks": "`compress --recover-blocks`",
        "all": "`compress --recover`", "given": "the same, `--recover-own 0`", "own": "the same, `--recover-own 1`",
        "long": "`--recover`, 8 passes of all the text"}
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
    numbers, cells = line["numbers"], []
    for text in TEXTS:
        cells.append(f"{numbers['texts'][text]['kl']:.4f}")
        if text in COMPARED:
            cells.append("" if case.how == "plain" else less(plain, line, text))
    return [case.model, f"{case.rate:g}", TOLD[case.how], f"{line['bytes']:,}", *cells,
            blimp(line, None if case.how == "plain" else plain),
            "GPU" if line.get("device") else f"{numbers['processor_s'] / 60:.1f}", f"{numbers['peak_bytes'] / 1e9:.1f}"]


def blimp(line: Line, plain: Line | None = None) -> str:
    """Return a model's accuracy on BLiMP, in percent, and by how much it is above that without recovery.

    With the latter's standard error over phenomena: pairs of one phenomenon are right or wrong together.
    """
    found = line["numbers"]["blimp"]
    told = f"{100 * found['accuracy']:.1f}"
    if plain is None:
        return told
    before = plain["numbers"]["blimp"]["phenomena"]
    moved = [100 * (right - before[name]) for name, right in found["phenomena"].items()]
    return f"{told} ({statistics.mean(moved):+.1f} ± {statistics.stdev(moved) / math.sqrt(len(moved)):.1f})"


def heads() -> list[str]:
    """Return the heads of the columns of texts."""
    return [head for text, name in TEXTS.items() for head in (f"KL, {name}", *(["less"] if text in COMPARED else []))]


def build(found: Mapping[str, Line]) -> str:
    """Return what was measured, a model and rate after the other."""
    body = [row(case, found[case.key], found.get(RecoveryCase(case.model, case.rate, "plain").key))
            for case in CASES if case.key in found]
    return table(["model", "bits", "recovery", "bytes", *heads(), "BLiMP, %", "processor, minutes", "peak, GB"], body)


def named(case: BesideCase) -> str:
    """Return what a row beside a published system is called."""
    if case.how == "efficientqat":
        return f"EfficientQAT, steps of {case.haste:g}" if case.haste != 1 else "EfficientQAT, steps as released"
    return f"Tersor, recovery: {TOLD[case.how]}"


def build_beside(found: Mapping[str, Line]) -> str:
    """Return a published system's rows, and ours at its bytes."""
    rows = [[case.model, named(case), f"{line['bytes']:,}",
             *(f"{line['numbers']['texts'][text]['kl']:.4f}" for text in TEXTS),
             blimp(line, found.get(BesideCase(case.model, "plain").key) if case.how == "long" else None)]
            for case in BESIDE if (line := found.get(case.key))]
    return table(["model", "", "bytes", *(f"KL, {name}" for name in TEXTS.values()), "BLiMP, %"], rows)


def build_blocks(found: Mapping[str, Line]) -> str:
    """Return seconds and memory of a recovery by blocks of a real size."""
    rows = []
    for case in BLOCKS:
        if line := found.get(case.key):
            numbers = line["numbers"]
            stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in numbers["by_stage"].items())
            rows.append([case.model, f"{case.tokens:,}", f"{numbers['seconds']:.0f}", stages,
                         f"{max(numbers['device_peaks']) / 1e9:.1f}", f"{max(numbers['peaks'].values()) / 1e9:.1f}"])
    return table(["model", "tokens", "seconds", "by stage", "device, GB", "host, GB"], rows)


TABLES = {"recovery": Table(build), "recovery-beside": Table(build_beside), "recovery-blocks": Table(build_blocks)}
