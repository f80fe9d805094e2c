"""Ladders of a cache's plan by name: codec strings from few bits to many."""

from __future__ import annotations

from tersor.codecs import Trellis
from tersor.codecs.trellis.filters import filters
from tersor.errors import CodecConfigError
from tersor.families.builtin import EFFORTS
from tersor.families.trellis import WINDOWS, window

RATES = (0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6)
KLT = tuple(f"klt{{bytes:{rate}}}{{runs}}" for rate in RATES)
LADDERS = ("klt", "trellis", "all")
EFFORT = "normal"  # whose windows take less time than klt does; those of `fast` a third of that (docs/log.md)


def ladder(name: str = "klt", effort: str = EFFORT) -> tuple[str, ...]:
    """Return the ladder of a name: `klt`, which trains tables; `trellis`, which trains a mean at most; `all`, both.

    Parameters
    ----------
    effort : str
        How long trellis codes are encoded, for which prompts wait.

    Raises
    ------
    CodecConfigError
        If there is no such ladder or effort.
    """
    if name not in LADDERS:
        raise CodecConfigError(f"a cache's codecs: expected one of {', '.join(LADDERS)}, found '{name}'; codec strings "
                               "of your own go into a ladder")
    if effort not in EFFORTS:
        raise CodecConfigError(f"effort: expected one of {', '.join(EFFORTS)}, found '{effort}'")
    return (KLT if name != "trellis" else ()) + (_trellis(effort) if name != "klt" else ())


def _trellis(effort: str) -> tuple[str, ...]:
    """Return trellis codes of every rate that has a window as short as the effort asks for.

    Each with a scale in a byte, around a mean, and with one of 16 bits: keys suffer from the steps of bytes, values do
    not (docs/log.md).
    """
    windows = ((bits, window(Trellis, bits, effort)) for bits in sorted({bits for bits, _ in filters()}))
    specs = (Trellis(bits, memory).spec() for bits, memory in windows
             if memory is not None and memory <= WINDOWS[effort])
    return tuple(f"{size}rot,{spec}" for spec in specs for size in ("ctr8,", ""))


class Bytes:
    """The placeholder `{bytes:…}`: a rate, as bytes a token and head."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __format__(self, rate: str) -> str:
        return str(max(1, min(self._dim, round(float(rate) * self._dim / 8))))


__all__ = ["Bytes", "EFFORT", "EFFORTS", "LADDERS", "ladder"]
