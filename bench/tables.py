"""Markdown tables of result lines, spliced between `<!-- bench:NAME -->` and `<!-- /bench -->`.

`python bench/tables.py` prints all tables, or those named; `--write` renews README.md and docs/, `--check` fails if a
table is stale, or if a result line names no commit of the history. Each suite brings its own builders.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":  # this folder, which Python puts first, holds no top-level modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import charges, markdown, results, suites
from bench.places import ROOT
from bench.suite import RefusedError, Table

MARKER = re.compile(r"(<!-- bench:(?P<name>[\w.-]+) -->\n).*?(?=<!-- /bench -->)", re.DOTALL)


def tables() -> Mapping[str, tuple[str, Table]]:
    """Return every table by name, with the suite whose lines it shows."""
    return {name: (table.source or suite.name, table) for suite in suites.every()
            for name, table in suite.tables.items()}


def render(name: str) -> str:
    """Return a table and, unless it is bare, its provenance.

    Raises
    ------
    LookupError
        If no table is called so, or nothing was measured for it.
    """
    known = tables()
    if name not in known:
        raise LookupError(f"no table 'bench:{name}'; known: {', '.join(known)}")
    source, table = known[name]
    starts = tuple(f"{prefix}|" for prefix in table.prefixes) or ("",)
    found = {key: line for key, line in results.newest(source, table.on).items() if key.startswith(starts)}
    if not found:
        raise LookupError(f"no results for 'bench:{name}'; run the suite '{source}' first")
    if table.bare:
        return f"{table.build(found)}\n"
    uncounted = "" if table.charged else charges.note(found.values())
    return f"{table.build(found)}\n\n{markdown.provenance(found.values())}{uncounted}\n"


def documents(root: Path = ROOT) -> list[Path]:
    """Return the files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def splice(text: str) -> str:
    """Return `text` with every marked table rendered anew."""
    return MARKER.sub(lambda match: match[1] + render(match["name"]), text)


def update(*, write: bool) -> list[Path]:
    """Return the documents with stale tables, relative to the root; rewrite them if asked to.

    Raises
    ------
    LookupError
        If a document asks for a table that cannot be rendered; names the document.
    """
    stale = []
    for file in filter(Path.is_file, documents()):
        text = file.read_text()
        try:
            fresh = splice(text)
        except LookupError as error:
            raise LookupError(f"{file.relative_to(ROOT)}: {error.args[0]}") from error
        if fresh != text:
            stale.append(file.relative_to(ROOT))
            if write:
                file.write_text(fresh)
    return stale


def show(names: list[str]) -> None:
    """Print tables."""
    for name in names or tables():
        try:
            print(f"## {name}\n\n{render(name)}")
        except LookupError as error:
            print(f"## {name}\n\n{error}\n")


def strangers() -> list[str]:
    """Return result lines that name no commit of the history; none where it is not at hand, which is said."""
    try:
        return results.strangers()
    except RefusedError as error:
        print(f"not checked: {error}")
        return []


def main(given: list[str] | None = None) -> int:
    """Print, write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="print these tables")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="update README.md and docs/**/*.md")
    group.add_argument("--check", action="store_true", help="exit with status 1 if a table is stale")
    arguments = parser.parse_args(given)
    if not (arguments.write or arguments.check):
        show(arguments.names)
        return 0
    try:
        stale = update(write=arguments.write)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    wrong = strangers() if arguments.check else []
    for problem in (*(f"{'updated' if arguments.write else 'stale'}: {file}" for file in stale), *wrong):
        print(problem)
    return 1 if arguments.check and (stale or wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
