"""One rule for what the fast run leaves to `make slow`: cases that run code which a case before them has run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def covering(chosen: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases in their order, those that are not among the chosen marked slow; each of the chosen is a case.

    A case is a tuple of arguments, or one argument. What is chosen must run every line that the cases run.
    """
    found = list(cases)
    assert all(case in found for case in chosen), [case for case in chosen if case not in found]
    return [case if case in chosen else
            pytest.param(*_tuple(case), marks=pytest.mark.slow) for case in found]


def in_turn(cases: Sequence[Any], kinds: Sequence[Any], whole: Collection[Any] = ()) -> list[Any]:
    """Return every case with every kind; in the fast run a case has one kind, in turn, those of `whole` all."""
    both = [(_tuple(case), kind, case in whole or number % len(kinds) == at)
            for number, case in enumerate(cases) for at, kind in enumerate(kinds)]
    return covering([(*case, kind) for case, kind, chosen in both if chosen], [(*case, kind) for case, kind, _ in both])


def _tuple(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
