"""The suites: a package a subject, each with its `SUITES`."""

from __future__ import annotations

import importlib

from bench.suite import RefusedError, Suite

SUBJECTS = ("matrices", "language", "qet", "kashin", "two_basis", "low_rank", "rom", "kv", "gpu", "vectors",
            "embeddings", "pictures", "trellis", "cpu", "compress", "serving", "adapters", "recovery")


def every() -> list[Suite]:
    """Return all suites."""
    return [suite for subject in SUBJECTS for suite in importlib.import_module(f"{__name__}.{subject}").SUITES]


def named(name: str) -> Suite:
    """Return a suite.

    Raises
    ------
    RefusedError
        If there is none of that name.
    """
    found = {suite.name: suite for suite in every()}
    if name not in found:
        raise RefusedError(f"no suite '{name}'; there are {', '.join(found)}")
    return found[name]
