"""Fixtures of the model tests: tiny models on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

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
