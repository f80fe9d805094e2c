"""Ladders of a cache's plan by name: codec strings from few bits to many."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tersor.codecs.trellis.filters import filters
from tersor.errors import CodecConfigError

RATES = (0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6)
KLT = tuple(f"klt{{bytes:{rate}}}{{runs}}" for rate in RATES)
EFFORTS: Mapping[str, int] = MappingProxyType({"fast": 8, "normal": 12, "best": 16})  # bits of a trellis's window
NEAR = 2  # bits by which a window may differ from that of the effort: each costs the encoder twice the time
LADDERS = ("klt", "trellis", "all")


def ladder(name: str = "klt", effort: str = "fast") -> tuple[str, ...]:
    """Return the ladder of a name: `klt`, which trains tables; `trellis`, which has none; `all`, both.

    Parameters
    ----------
    effort : str
        How long trellis codes are encoded: prompts wait for it, so caches want `fast`.

    Raises
    ------
    CodecConfigError
        If there is no such ladder or effort.
    """
    if name not in LADDERS:
        raise CodecConfigError(f"a cache's ladder must be one of {', '.join(LADDERS)}, found '{name}'")
    if effort not in EFFORTS:
        raise CodecConfigError(f"effort must be one of {', '.join(EFFORTS)}, found '{effort}'")
    return (KLT if name != "trellis" else ()) + (_trellis(EFFORTS[effort]) if name != "klt" else ())


def _trellis(memory: int) -> tuple[str, ...]:
    """Return rotated trellis codes of every rate that has a filter about as long, the nearest of each."""
    rungs = []
    for rate in sorted({rate for rate, _ in filters()}):
        there = min((bits for at, bits in filters() if at == rate), key=lambda bits: abs(bits - memory))
        if abs(there - memory) <= NEAR:
            rungs.append(f"rot,tr{rate:g}" + ("" if there == 12 else f"x{there}"))
    return tuple(rungs)


__all__ = ["EFFORTS", "LADDERS", "ladder"]
