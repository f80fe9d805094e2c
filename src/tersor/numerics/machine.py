"""Functions that numba compiles for the processor, kept on disk where there is a place for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
        made = numba.njit(nogil=True, boundscheck=False, **options)(function)
        try:
            made.enable_caching()
        except RuntimeError as error:  # numba's own, where it finds no place
            _LOG.info("%s is compiled anew in every process: %s", function.__qualname__, error)
        return made

    return compiled
