"""Measure README.md: words before the install line, and the median length of a sentence.

`tools/check_readme.py` prints both; its exit status is 1 where one is over its ceiling.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
MOST_WORDS = 120
MOST_MEDIAN = 14
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def words(text: str) -> list[str]:
    """Return the words of a text: whatever stands between blanks and has a letter or a digit, link targets apart."""
    return [word for word in LINK.sub(r"\1", text).split() if re.search(r"[^\W_]", word)]


def words_before_install(text: str) -> int:
    """Return how many words, those of tables and headings too, stand before the heading "Install"."""
    head, found, _ = text.partition("\n## Install\n")
    if not found:
        raise ValueError("README.md has no heading '## Install'")
    return len(words(COMMENT.sub("", head)))


def sentences(text: str) -> list[str]:
    """Return the sentences of the prose: no code, headings, tables or comments; each list item begins one."""
    prose = COMMENT.sub("", CODE.sub("", text))
    lines = [line for line in prose.splitlines() if line[:1] not in ("#", "|")]
    blocks = re.split(r"\n\s*\n|\n(?=[*-] )", "\n".join(lines))
    parts = (part for block in blocks for part in re.split(r"(?<=[.!?])\s+", LINK.sub(r"\1", block)))
    return [part for part in parts if words(part)]


def median_sentence(text: str) -> float:
    """Return the median number of words of a sentence."""
    return statistics.median(len(words(sentence)) for sentence in sentences(text))


def main() -> int:
    """Print the measures and judge them."""
    text = README.read_text(encoding="utf-8")
    before, median = words_before_install(text), median_sentence(text)
    print(f"words before the install line: {before} (at most {MOST_WORDS})")
    print(f"median sentence: {median:g} words (at most {MOST_MEDIAN})")
    return int(before > MOST_WORDS or median > MOST_MEDIAN)


if __name__ == "__main__":
    sys.exit(main())
