"""Markdown: tables, verdicts, and the line under a table that says where its figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNKNOWN = "unknown"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; every column but the first is right-aligned."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def verdict(passed: bool | None, missed: str = "**fail**") -> str:
    """Return "pass", or `missed`, or nothing where there is no target."""
    return "" if passed is None else "pass" if passed else missed


def provenance(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return one line that says where and when figures were measured.

    A line whose commit is unknown was measured on a tree that no commit holds: its figures are said to be so.
    """
    held = list(lines)
    days = sorted({line["date"][:10] for line in held})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    machines = sorted({line["machine"]["cpu"] for line in held})
    threads = sorted({line["machine"]["threads"] for line in held})
    several = f"{threads[0]} to {threads[-1]}" if len(threads) > 1 else str(threads[0])
    versions = sorted({line["versions"]["torch"] for line in held})
    seeds = sorted({str(line["seed"]) for line in held})
    told = f"{several} thread{'' if several == '1' else 's'}, torch {' and '.join(versions)}; seed {', '.join(seeds)}."
    return f"Measured {when}, {_commits(held)}, on {' and '.join(machines)}, {told}"


def _commits(held: Sequence[Mapping[str, Any]]) -> str:
    known = sorted({line["commit"] for line in held} - {UNKNOWN})
    lost = sum(line["commit"] == UNKNOWN for line in held)
    if not known:
        return "commit unknown"
    told = f"{'commit' if len(known) == 1 else 'commits'} {', '.join(f'`{one}`' for one in known)}"
    return f"{told}, and unknown for {lost} of {len(held)} lines" if lost else told
