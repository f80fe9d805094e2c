"""Every Python block in the documentation runs, or says why not in a comment before it; links and commands exist."""

import re
from pathlib import Path

import pytest

from tersor import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
GUIDES = [page for page in PAGES  # test_guides.py's
          if page.parent.name == "howto" or page.name in ("tutorial.md", "serving.md")]
BLOCK = re.compile(r"(?P<skip><!-- not run: (?P<reason>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", sorted({*PAGES} - {*GUIDES}), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCK.finditer(page.read_text()):
        if block["skip"]:
            assert len(block["reason"].strip()) > 10
        else:
            exec(compile(block["code"], str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_command_in_the_readme_exists() -> None:
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    commands |= {group.name for group in cli.app.registered_groups}
    shown = set(re.findall(r"^tersor (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert shown
    assert shown <= commands


def test_doctests() -> None:
    import doctest

    from tersor import api

    assert doctest.testmod(api).attempted >= 3
    assert doctest.testmod(api).failed == 0
