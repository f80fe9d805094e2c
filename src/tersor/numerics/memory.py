"""How much memory there is, and a refusal for what asks for more of it than that."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

from tersor.errors import NoMemoryError

SMALL = 1 << 28  # bytes that are taken without a look at what there is
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Return the bytes that can still be taken: what the system tells, or all that is built in; None if unknown."""
    found = [_meminfo(), _cgroup()]
    known = [value for value in found if value is not None]
    if known:
        return min(known)
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not set(names) <= set(getattr(os, "sysconf_names", {})):
        return None
    return os.sysconf(names[0]) * os.sysconf(names[1])


def give_back(*, cycles: bool = False) -> None:
    """Hand what was freed back to the system, where the C library keeps it and can be told to: glibc's does.

    `cycles`: free first what is unreachable but for references in a circle, as models with hooks are; takes a moment.
    """
    if cycles:
        gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another library; Windows has none under this name
        return


def _meminfo() -> int | None:
    """Return what Linux says is available, swap included."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, LookupError):
        return None


def _cgroup() -> int | None:
    """Return what a container's limit leaves; None without one."""
    try:
        return int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def check_memory(nbytes: int, what: str, instead: str) -> None:
    """Raise `NoMemoryError` if `nbytes` are more than there are.

    A few bytes can claim a matrix of any size, as a code of low rank does, so size alone is no sign of damage.

    Parameters
    ----------
    what : str
        Who asks, for the message.
    instead : str
        What the user can do.
    """
    if nbytes <= SMALL:
        return
    room = available()
    if room is not None and nbytes > room:
        raise NoMemoryError(f"{what} takes {nbytes} bytes of memory, and {max(0, room)} are available; {instead}",
                            nbytes)


__all__ = ["available", "check_memory"]
