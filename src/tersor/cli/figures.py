"""Times, counts and records as people read them; and sizes as people give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tersor.errors import BudgetError
from tersor.figures import scaled, size_text

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size: 1 MB = 10^6 bytes, 1 MiB = 2^20 bytes.

    Raises
    ------
    BudgetError
        If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*((?:[kKmMgGtT]i?)?)B?\s*", text)
    if not match:
        raise BudgetError(f"size '{text}': expected a number and a unit, such as 5MB, 900kB, 2GiB or 123456")
    return int(float(match[1]) * UNITS[match[2].lower()])


def count_text(count: int) -> str:
    """Return a count: exactly below a hundred thousand, else in thousands, millions or billions."""
    return str(count) if abs(count) < 10**5 else scaled(count, ("", "thousand", "million", "billion", "trillion"))


def seconds_text(seconds: float) -> str:
    """Return a time in the unit that suits it: `12 min`."""
    for limit, unit, name in ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (2 * 86400.0, 3600.0, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 10 and not (name == "min" and value >= 2) else f"{value:.0f} {name}"
    return f"{seconds / 86400:.1f} days"


def readable(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a flat record as labels and texts for people; what is nested or None is left out."""
    found = []
    for key, value in record.items():
        if value is None or isinstance(value, (dict, list)):
            continue
        label, text = _label(key), _text(key, value)
        if key == "bytes" and record.get("bytes_original"):
            times = record["bytes_original"] / max(1, value)
            text += f", {times:.1f}x smaller" if times >= 1 else f", {1 / times:.1f}x larger"
        found.append((label, text))
    return found


def _is_size(key: str) -> bool:
    return key == "budget" or "bytes" in key.split("_")


def _label(key: str) -> str:
    """Return a key in words: what it measures stands last, unless something is said of it."""
    words = ["size" if word == "bytes" else "time" if word == "seconds" else word for word in key.split("_")]
    if words[0] in ("size", "time") and words[1:2] != ["on"]:
        words = [*words[1:], words[0]]
    label = " ".join(words)
    return {"rate": "bits per element", "top1": "same top token", "kl": "KL to the original"}.get(label, label)


def _text(key: str, value: Any) -> str:
    if isinstance(value, (bool, str)):
        return str(value)
    if _is_size(key):
        return size_text(value)
    if key == "seconds" or key.startswith("seconds_"):
        return seconds_text(value)
    if key == "top1":
        return f"{100 * value:.1f} %"
    return count_text(value) if isinstance(value, int) else f"{value:.4g}"
