"""Guides run from top to bottom, commands and Python alike; the README is short, and its figures are measured ones."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from tools import check_readme
from typer.testing import CliRunner

from tersor import cli

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "docs/tutorial.md", ROOT / "docs/serving.md", *sorted((ROOT / "docs/howto").glob("*.md"))]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?P<skip><!-- not run: (?P<reason>[^>]+) -->\n)?(?:<!-- needs: (?P<needs>\w+) -->\n)?"
                   r"```(?P<kind>python|sh)\n(?P<code>.*?)```", re.DOTALL)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


def commands(code: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    found = [line[1:] for line in lines if line[:1] == ["tersor"]]
    assert len(found) == len([line for line in lines if line]), f"only commands of tersor can be run: {code}"
    return found


@pytest.mark.usefixtures("read_back_here")
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_run(page: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bundled model with fewer layers and words: a page's code is the same, and takes a third of the time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "fable-7m").symlink_to(short)
    names: dict[str, object] = {}
    ran = 0
    for block in BLOCK.finditer(page.read_text()):
        if block["skip"]:
            assert len(block["reason"].strip()) > 10
        elif block["needs"] and importlib.util.find_spec(block["needs"]) is None:
            continue  # a server that CI installs, and not everyone
        elif block["kind"] == "python":
            exec(compile(block["code"], str(page), "exec"), names)
            ran += 1
        else:
            for arguments in commands(block["code"]):
                result = CliRunner().invoke(cli.app, arguments)
                assert result.exit_code == 0, f"tersor {shlex.join(arguments)}: {result.output}{result.exception!r}"
                ran += 1
    assert ran


def test_the_readme_is_short() -> None:
    assert check_readme.words_before_install(README) <= check_readme.MOST_WORDS
    assert check_readme.median_sentence(README) <= check_readme.MOST_MEDIAN


def test_the_measures_of_the_readme_count_what_they_should() -> None:
    text = "# T\n\nOne two. Three [four](x/y.md) five!\n\n| a | b 3 |\n| --- | --- |\n\n## Install\n\nSix\nseven.\n"
    assert check_readme.words_before_install(text) == 1 + 2 + 3 + 3
    assert check_readme.median_sentence(text) == 2.0
    assert check_readme.sentences("```sh\na b c.\n```\n<!-- d -->\n* E f.\n* G") == ["* E f.", "* G"]


def test_figures_of_the_readme_are_rows_of_the_generated_tables() -> None:
    rows = [cells(line) for line in README.splitlines() if re.match(r"\| .*\d\.\d", line)]
    measured = [cells(line) for line in (ROOT / "docs/figures.md").read_text().splitlines() if line.startswith("|")]
    assert 4 <= len(rows) <= 8
    for method, *figures in rows:
        assert any(found[0].startswith(method) and set(figures) <= set(found) for found in measured), (method, figures)
