"""What all tests share: a seeded generator, and poison in memory that Tersor allocates without filling."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.fable import shorten

settings.register_profile("tersor", derandomize=True, deadline=None)  # the same examples every time, on any machine
settings.load_profile("tersor")
torch.set_num_threads(1)  # many small operations on a shared machine; what depends on threads sets its own number
JUNK = {torch.bool: True, torch.uint8: 0xA5}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep what is there before the first test out of Python's collector, which a run calls between its stages.

    The objects of ten thousand tests and of all imports are never garbage; to look through them takes half a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _kept() -> None:
    """The same for what a file's tests have imported and made for all that follow."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of this test's own; the global one stays untouched."""
    return torch.Generator().manual_seed(20240229)


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with NaN, or with a junk value where NaN does not exist."""
    junk = float("nan") if tensor.is_floating_point() else JUNK.get(tensor.dtype, 0x5A)
    return tensor.fill_(junk) if tensor.device.type != "meta" else tensor


def _poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return fill(tensor) if caller.partition(".")[0] == "tersor" else tensor

    return allocate


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty` and its kin return NaN and junk when Tersor calls them."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty",):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with two of its layers and an eighth of its words; never damaged, so one serves a process."""
    return shorten(tmp_path_factory.mktemp("short") / "model")


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the same verification in this process: starting another takes seconds. `test_cli.py` starts one."""
    _verify_here(monkeypatch, proven=True)


@pytest.fixture
def read_back_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, but for the model's run, for tests that run it themselves or compare bytes: the run is half of it."""
    _verify_here(monkeypatch, proven=False)


def _verify_here(monkeypatch: pytest.MonkeyPatch, *, proven: bool) -> None:
    from tersor.hf.compress import recover, run
    from tersor.hf.compress.verify import verify
    from tersor.hf.models.source import open_source

    def here(path: Path, against: Path, *_: Any) -> dict[str, Any]:
        return verify(path, open_source(against, path / "unused"), proven=proven)

    for module in (recover, run):
        monkeypatch.setattr(module, "verify_in_fresh_process", here)
