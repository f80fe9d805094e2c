"""Hooks of the documentation site (`mkdocs.yml`): pages that lie outside docs/, and links that leave it.

README.md is the front page. Links to pages of the site become links within it; a link to any other file of the
repository becomes its text, because the site does not hold that file.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE: Mapping[str, str] = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md",
    "bench/README.md": "bench.md",
    **{str(page.relative_to(ROOT)): f"ops/{page.parent.name}.md"
       for page in sorted((ROOT / "src/tersor/ops").glob("*/README.md"))},
}
"""Path in the repository to page of the site."""

DECISIONS = "adr/index.md"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/, and the list of decisions."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, DECISIONS, content=decisions()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site."""
    del config
    return relinked(markdown, page.file.src_uri, files)


def decisions() -> str:
    """Return the list of decision records, newest first."""
    titles = {page.name: page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
              for page in sorted((ROOT / "docs/adr").glob("[0-9]*.md"), reverse=True)}
    rows = [f"* [{title}]({name})" for name, title in titles.items()]
    head = ["# Decisions", "", "A decision about the contract or the format is written down once.", ""]
    return "\n".join([*head, *rows, ""])


def relinked(markdown: str, uri: str, files: Files) -> str:
    """Return the text of a page with each link to a file of the repository made one of the site, or plain text."""
    homes = {page: source for source, page in OUTSIDE.items()}
    folder = posixpath.dirname(homes.get(uri, f"docs/{uri}"))

    def point(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        page = OUTSIDE.get(path, path.removeprefix("docs/"))
        found = next((name for name in (page, f"{page}/index.md") if files.get_file_from_path(name)), None)
        if found is None:
            return match["text"] if (ROOT / path).exists() else match[0]
        return f"[{match['text']}]({posixpath.relpath(found, posixpath.dirname(uri) or '.')}{match['anchor'] or ''})"

    return LINK.sub(point, markdown)
