"""Tables that come with the package, such as codebooks: no file holds them, so comparisons of little data charge them.

A result line names its codec; the codec says which tables decoding may need (`Codec.package_tables`). Peers bring no
such tables: what they train, they store.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.suite import Line
from tersor.contract.derived import package_nbytes
from tersor.errors import TersorError
from tersor.registry import parse

LITTLE = 10**6  # bytes below which a table of 120 kB matters
SHARE = 0.01  # of a line's bytes, below which tables go without saying


def package_bytes(line: Line) -> int:
    """Return the bytes of the package's tables that decoding what a line measured may need, at most; of peers none."""
    numbers, case = line["numbers"], line["case"]
    named = [numbers.get("codec"), numbers.get("setting"), case.get("codec"), case.get("method")]
    for text in (one for one in named if isinstance(one, str)):
        try:
            return package_nbytes([parse(word) for word in text.removeprefix("tersor:").split()])
        except TersorError:
            continue  # a peer, a family, or words
    return 0


def charged(line: Line) -> int:
    """Return a line's bytes, with those of the package's tables."""
    return line["bytes"] + package_bytes(line)


def note(lines: Iterable[Line]) -> str:
    """Return what to say under a table that counts no tables of the package; empty where they are no hundredth."""
    little = [size for line in lines if 0 < line["bytes"] < LITTLE
              and (size := package_bytes(line)) >= SHARE * line["bytes"]]
    if not little:
        return ""
    if min(little) == max(little):
        return f" Not counted: {max(little):,} bytes of tables that come with the package."
    return f" Not counted: tables that come with the package, {min(little):,} to {max(little):,} bytes a codec."
