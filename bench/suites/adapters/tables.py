"""The table of adapters: the loss on text set apart, from the first step to the last."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table
from bench.suite import Line, Table
from bench.suites.adapters.cases import CASES, AdapterCase

STEPS = (0, 10, 20, 30, 40)  # at which the text set apart is looked at


def row(case: AdapterCase, line: Line) -> list[str]:
    """Return the row of a case."""
    losses = line["numbers"]["apart"]
    held = "dense" if case.rate is None else f"{case.rate:g} bits"
    return [case.model, held, "the codes' error" if case.begun else "nothing", *(f"{loss:.3f}" for loss in losses),
            f"{losses[0] - losses[-1]:.3f}"]


def build(found: Mapping[str, Line]) -> str:
    """Return the losses of every fine-tune."""
    return table(["model", "weights", "adapter begins as", *(f"step {step}" for step in STEPS), "fallen by"],
                 [row(case, found[case.key]) for case in CASES if case.key in found])


TABLES = {"adapters": Table(build)}
