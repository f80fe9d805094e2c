"""Result lines: written from clean trees only, and each names a commit of the history or says unknown."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench.suite import Asked, Outcome, RefusedError, Result, Section, Suite, Unmeasured, sections

from bench import results, run, suites


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    done = subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with code and results, all committed."""
    for folder in ("src", "bench/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src" / "code.py").write_text("x = 1\n")
    (tmp_path / "bench" / "results" / "one.jsonl").write_text("{}\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def measure(cases: Sequence[Section], asked: Asked) -> Iterator[Outcome]:
    del asked
    for case in cases:
        if case.name == "absent":
            yield Unmeasured(case.key, "not here")
        else:
            yield Result.of(case, 3, {"value": 1 / 3, "passed": case.name != "bad"})


SUITE = Suite("fake", "for tests", sections("good", "bad", "absent"), measure)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The suite "fake", and the folder that its lines would go to."""
    monkeypatch.setattr(suites, "named", lambda name: SUITE)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def test_a_clean_tree_is_named_by_its_commit(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert head.startswith(results.clean_commit(repository))
    (repository / "bench" / "results" / "one.jsonl").write_text("{}\n{}\n")  # results may grow
    assert head.startswith(results.clean_commit(repository))


@pytest.mark.parametrize("name", ["src/code.py", "src/new.py", "README.md"])
def test_a_tree_with_changes_is_refused(repository: Path, name: str) -> None:
    (repository / name).write_text("x = 2\n")
    with pytest.raises(RefusedError, match=f"clean tree only.*{name}"):
        results.clean_commit(repository)


def test_a_folder_without_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="git cannot say"):
        results.clean_commit(tmp_path)


def test_write_is_refused_before_anything_is_measured(fake: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(results, "changed", lambda root: [" M src/tersor/api.py"])
    assert run.main(["fake", "--write"]) == 2
    told = capsys.readouterr()
    assert "clean tree only" in told.err
    assert "src/tersor/api.py" in told.err
    assert told.out == ""
    assert list(fake.iterdir()) == []


def test_write_from_a_clean_tree(fake: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(results, "changed", lambda root: [])
    assert run.main(["fake", "--write"]) == 1  # one misses its target
    lines = results.read(fake / "fake.jsonl")
    assert [line["key"] for line in lines] == ["good", "bad"]
    assert {line["commit"] for line in lines} == {git(Path(run.__file__).parent, "rev-parse", "--short=10", "HEAD")}
    assert lines[0]["numbers"] == {"value": 0.333333, "passed": True}
    told = capsys.readouterr().out
    assert "MISSED  bad" in told
    assert "left out  absent: not here" in told
    assert run.main(["fake", "good"]) == 0  # nothing is written unless asked for
    assert len(results.read(fake / "fake.jsonl")) == 2
    assert run.main(["fake", "--missing"]) == 0  # only what has no line


def test_lines_from_elsewhere_are_merged_where_the_code_is_the_same(fake: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    out = fake / "out"
    assert run.main(["fake", "good", "--out", str(out)]) == 0
    (line,) = results.read(out / "fake.jsonl")
    assert (line["commit"], line["tree"]) == ("unknown", results.digest())
    monkeypatch.setattr(results, "clean_commit", lambda: "0123456789")
    assert run.main(["fake", "--merge", str(out)]) == 0
    (merged,) = results.read(fake / "fake.jsonl")
    assert merged == {name: value for name, value in {**line, "commit": "0123456789"}.items() if name != "tree"}
    (out / "fake.jsonl").write_text(json.dumps({**line, "tree": "other"}) + "\n")
    assert run.main(["fake", "--merge", str(out)]) == 2
    assert "digest other" in capsys.readouterr().err
    assert run.main(["fake", "--merge", str(fake / "nowhere")]) == 2
    assert len(results.read(fake / "fake.jsonl")) == 1


def test_lines_name_commits_of_the_history(tmp_path: Path) -> None:
    head = git(Path(run.__file__).parent, "rev-parse", "--short=10", "HEAD")
    lines: list[dict[str, Any]] = [{"commit": head}, {"commit": "unknown"}, {"commit": f"{head}+dirty"}, {}]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert results.strangers(tmp_path) == ["one.jsonl: '' is no commit of the history",
                                           f"one.jsonl: '{head}+dirty' is no commit of the history"]


def test_code_of_another_tree_is_refused(repository: Path) -> None:
    with pytest.raises(RefusedError, match="tersor is imported from"):
        results.check_code(repository)
    results.check_code()


def test_digest_changes_with_the_code(repository: Path) -> None:
    before = results.digest(repository)
    (repository / "bench" / "results" / "one.jsonl").write_text("{}\n{}\n")
    assert results.digest(repository) == before
    (repository / "src" / "code.py").write_text("x = 2\n")
    assert results.digest(repository) != before


def test_two_places_and_unknown_suites_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["nonsense"]) == 2
    assert "no suite 'nonsense'; there are gaussian" in capsys.readouterr().err
    assert run.main(["gaussian", "--list", "outliers", "rot,lm4"]) == 0
    assert capsys.readouterr().out == "outliers|rot,lm4|4096\n"
    assert run.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(suites.every())
    assert run.main(["kashin", "--write", "--out", "x"]) == 2
