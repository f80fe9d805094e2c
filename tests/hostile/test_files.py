"""Damaged and forged files of every kind: a typed error or the right result, in bounded memory and time, nothing else.

`python -m tests.hostile.campaign` tries thousands and prints the table.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.judge import GOOD, expected, judge
from tests.hostile.kinds import EVERY, HEAVY

MUTANTS = {kind.name: 20 for kind in HEAVY}  # of the others: 60
SEEDS = st.integers(0, 2**40)


@functools.cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f"hostile-{os.getpid()}-")


@functools.cache
def _sound(name: str) -> Path:
    folder = Path(_place().name) / str(list(EVERY).index(name))
    folder.mkdir()
    EVERY[name].make(folder)
    return folder


@pytest.mark.parametrize("name", EVERY)
def test_sound_files_read_as_they_were_written(name: str) -> None:
    assert expected(EVERY[name], _sound(name)) or name == "npz"


@pytest.mark.parametrize("name", EVERY)
def test_mutants_are_refused_by_type_or_read_right(name: str) -> None:
    sound, scratch = _sound(name), Path(_place().name) / "mutant"
    assert expected(EVERY[name], sound) or name == "npz"  # what is imported on the way is no part of a mutant's memory

    @settings(max_examples=MUTANTS.get(name, 60), derandomize=True, database=None, deadline=30_000,
              suppress_health_check=list(HealthCheck))
    @given(SEEDS)
    def holds(seed: int) -> None:
        found = judge(EVERY[name], sound, scratch, seed)
        assert found.verdict in GOOD, found.detail

    holds()
