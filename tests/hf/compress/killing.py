"""Runs that are killed at a certain call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def killed_after(count: int, of: type, method: str) -> Iterator[None]:
    """Let a method of a class do its work so many times, then be interrupted, as the block then has to be."""
    own, calls = getattr(of, method), 0

    def counted(self: object, *given: object) -> None:
        nonlocal calls
        calls += 1
        if calls > count:
            raise KeyboardInterrupt
        own(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, method, counted)
        with pytest.raises(KeyboardInterrupt):
            yield
