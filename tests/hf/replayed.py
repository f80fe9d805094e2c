"""Graphs as of CUDA, on a processor, and what Tersor's loops say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tersor.hf.models import capturing


class Replayed:
    """A graph as of CUDA: what was called when it was made is called again, with what was given then."""

    def __init__(self, step: Callable[[], Any], device: torch.device) -> None:
        self.replay = step


def replay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps on the processor be captured, and called again as they were then."""
    monkeypatch.setattr(capturing, "DEVICES", {"cpu"})
    monkeypatch.setattr(capturing, "capture", Replayed)
    monkeypatch.setattr(capturing, "try_out", lambda step: step())


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the loops have said."""
    return [record.getMessage() for record in caplog.records if record.name == "tersor.hf"]
