"""Tables: Markdown, provenance, and that what the documents show is what results hold."""

from __future__ import annotations

from typing import Any

import pytest
from bench.suite import RefusedError
from bench.suites.recovery.cases import RecoveryCase
from bench.suites.recovery.tables import build as recovery

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


def recovered(how: str, kl: float) -> dict[str, Any]:
    texts = {name: {"kl": kl * scale} for name, scale in
             {"fiction": 1, "speech": 1, "technical": 1, "house": 1, "wikitext": 2}.items()}
    return {"case": {"model": "fable-7m", "rate": 2.0, "how": how}, "bytes": 1234567,
            "numbers": {"texts": texts, "blimp": {"accuracy": 0.6543, "error": 0.0032}, "processor_s": 90.0,
                        "peak_bytes": 2.84e9}}


def test_recovery_is_told_in_percent_of_what_it_began_with() -> None:
    """And BLiMP beside it: of two kinds of pairs one rises by 1 % and one by 3, so by 2 on average, give or take 1."""
    found = {RecoveryCase("fable-7m", 2.0, how).key: recovered(how, kl) for how, kl in (("all", 0.4), ("plain", 0.5))}
    for key, shares in (("plain", (0.5, 0.7)), ("all", (0.51, 0.73))):
        found[f"fable-7m|2|{key}"]["numbers"]["blimp"]["phenomena"] = dict(zip("ab", shares, strict=True))
    rows = [row.strip("| ").split(" | ") for row in recovery(found).splitlines()[2:]]
    assert [row[2] for row in rows] == ["none", "`compress --recover`"]
    assert rows[0][7:11] == ["0.5000", "", "1.0000", ""]
    assert rows[1][3:] == ["1,234,567", "0.4000", "0.4000", "0.4000", "0.4000", "20.0 %", "0.8000", "20.0 %",
                           "65.4 (+2.0 ± 1.0)", "1.5", "2.8"]
    del found["fable-7m|2|plain"]
    assert recovery(found).splitlines()[2].count("%") == 0  # nothing to compare with


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
        tables.render("models-fable-7m")
