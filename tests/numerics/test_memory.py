"""How much memory there is, by what the system says of it."""

import gc
import weakref
from pathlib import Path

import pytest

from tersor.numerics import memory


def test_here_some_is_available() -> None:
    assert (memory.available() or 1) > 0


def test_the_least_of_what_is_known_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\nSwapFree: 2 kB\n")
    assert memory.available() == 7 * 1024
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "memory.current").write_text("96\n")
    assert memory.available() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() == 7 * 1024
    meminfo.write_text("nothing\n")
    assert memory.available() is None or (memory.available() or 0) > 0  # all that is built in


def test_what_refers_to_itself_is_freed_where_that_is_asked_for() -> None:
    class Model:
        def __init__(self) -> None:
            self.hook = self.forward

        def forward(self) -> None:
            pass

    held = weakref.ref(Model())
    gc.disable()
    try:
        memory.give_back()
        kept = held() is not None
        memory.give_back(cycles=True)
    finally:
        gc.enable()
    assert kept
    assert held() is None
