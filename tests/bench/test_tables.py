"""Tables: Markdown, provenance, and that what the documents show is what results hold."""

from __future__ import annotations

from typing import Any

import pytest
from bench.suite import RefusedError

from bench import markdown, results, tables


def line(commit: str, date: str = "2026-11-22T10:00:00Z") -> dict[str, Any]:
    return {"commit": commit, "date": date, "machine": {"cpu": "AMD EPYC", "threads": 1},
            "versions": {"torch": "2.13.0"}, "seed": 0}


def test_a_table() -> None:
    assert markdown.table(["method", "bytes", "error"], [["`lm2`", "12", "0.1"], ["`lm3`", "18", "0.03"]]) == (
        "| method | bytes | error |\n"
        "| --- | ---: | ---: |\n"
        "| `lm2` | 12 | 0.1 |\n"
        "| `lm3` | 18 | 0.03 |")


def test_verdicts() -> None:
    assert [markdown.verdict(passed) for passed in (None, True, False)] == ["", "pass", "**fail**"]
    assert markdown.verdict(False, "**missed**") == "**missed**"


@pytest.mark.parametrize(("commits", "told"), [
    (("abc",), "commit `abc`,"), (("abc", "def", "abc"), "commits `abc`, `def`,"), (("unknown",), "commit unknown,"),
    (("abc", "unknown", "unknown"), "commit `abc`, and unknown for 2 of 3 lines,")])
def test_provenance_says_which_commits_are_unknown(commits: tuple[str, ...], told: str) -> None:
    found = markdown.provenance([line(commit) for commit in commits])
    assert found == f"Measured 2026-11-22, {told} on AMD EPYC, 1 thread, torch 2.13.0; seed 0."


def test_provenance_of_several_days() -> None:
    found = markdown.provenance([line("a", "2026-11-22T10:00:00Z"), line("a", "2026-11-24T10:00:00Z")])
    assert found.startswith("Measured 2026-11-22 to 2026-11-24,")


def test_every_marker_has_a_builder_and_no_table_is_stale() -> None:
    known, asked = tables.tables(), set()
    for file in tables.documents():
        asked |= {match["name"] for match in tables.MARKER.finditer(file.read_text())}
    assert asked
    assert asked <= known.keys()
    assert tables.update(write=False) == []


def test_results_name_their_commits() -> None:
    try:
        assert results.strangers() == []
    except RefusedError as error:
        pytest.skip(str(error))


def test_unknown_tables_are_named() -> None:
    with pytest.raises(LookupError, match="no table 'bench:nonsense'"):
        tables.splice("<!-- bench:nonsense -->\n<!-- /bench -->\n")
    with pytest.raises(LookupError, match="run the suite 'models' first"):
        tables.render("models-smollm2-135m")
