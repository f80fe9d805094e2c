"""Functions that numba compiles for the processor, kept on disk where there is a place for them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_LOG = logging.getLogger("tersor.ops")


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return what compiles a function at its first call: without Python's lock, without checks of bounds.

    What is compiled is kept beside the module or in the user's cache. In a container where neither can be written it is
    compiled once a process, which is logged.

    Parameters
    ----------
    **options
        As of `numba.njit`.
    """
    def compiled(function: Callable[..., Any]) -> Any:
        made: Any = numba.njit(nogil=True, boundscheck=False, **options)(function)
        try:
            made.enable_caching()
            with contextlib.suppress(AttributeError):  # another numba may keep it elsewhere, and look at the file alone
                made._cache._cache_file._source_stamp = _stamp(Path(function.__code__.co_filename).parent)
        except RuntimeError as error:  # numba's own, where it finds no place
            _LOG.info("%s is compiled anew in every process: %s", function.__qualname__, error)
        return made

    return compiled


@functools.cache
def _stamp(folder: Path) -> tuple[tuple[str, float, int], ...]:
    """Return what says whether sources have changed: those beside a function, and of two folders above.

    numba looks at the function's own file alone; constants, and functions that are compiled into it, come from others.
    """
    files = [file for one in (folder, *list(folder.parents)[:2]) for file in sorted(one.glob("*.py"))]
    return tuple((str(file), file.stat().st_mtime, file.stat().st_size) for file in files)
