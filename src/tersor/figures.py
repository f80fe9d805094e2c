"""Numbers as people read them."""

from __future__ import annotations

import math


def size_text(nbytes: float) -> str:
    """Return bytes in the decimal unit that suits them: `2.6 MB`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    return scaled(nbytes, ("bytes", "kB", "MB", "GB", "TB", "PB"))


def scaled(value: float, units: tuple[str, ...]) -> str:
    """Return a number in the unit that suits it, of units a thousand apart."""
    power = min(len(units) - 1, int(math.log10(abs(value)) / 3 + 1e-12))
    scaled = value / 1000**power
    if round(scaled) >= 1000 and power + 1 < len(units):
        power, scaled = power + 1, scaled / 1000
    return f"{scaled:.1f} {units[power]}" if scaled < 100 else f"{scaled:.0f} {units[power]}"


class Amount(int):
    """What of a stage is done, with what a count alone does not say.

    Attributes
    ----------
    place : str
        `"block 3 of 24"`, or nothing.
    nbytes : int
        Of the original's weights, those that the stage is done with.
    memory : int
        Bytes that the process holds.
    """

    place: str
    nbytes: int
    memory: int

    def __new__(cls, done: int, place: str = "", nbytes: int = 0, memory: int = 0) -> Amount:
        """Return a count that knows more."""
        made = super().__new__(cls, done)
        made.place, made.nbytes, made.memory = place, nbytes, memory
        return made
