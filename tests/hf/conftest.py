"""Fixtures of the model tests: tiny models on disk, verification in this process (one test uses a fresh one)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tersor.hf.compress import run
from tersor.hf.compress.verify import verify
from tersor.hf.models.source import open_source
from tests.hf.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model, by architecture; written once a session."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the same verification in this process: starting another takes seconds."""
    monkeypatch.setattr(run, "verify_in_fresh_process",
                        lambda path, against: verify(path, open_source(against, path / "unused")))
