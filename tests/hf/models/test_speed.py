"""How fast models generate: what is measured, by a clock that counts tokens; and what `evaluate` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tersor.errors import ModelError
from tersor.hf.models import speed
from tests.hf.tiny import load_original

IDS = torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(3))


class Clocked:
    """A model that takes a second to read its prompt, then a quarter a token; and seven seconds to compile."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.now, self.compiled = torch.device(device), 100.0, False
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def generate(self, prompt: torch.Tensor, *, max_new_tokens: int, cache_implementation: str = "dynamic",
                 **named: Any) -> None:
        assert named["min_new_tokens"] == max_new_tokens
        assert prompt.shape == (1, speed.PROMPT)
        static = cache_implementation == "static"
        self.now += 1 + (max_new_tokens - 1) / (16 if static else 4)
        if static and not self.compiled:
            self.compiled, self.now = True, self.now + 7


def test_first_and_later_tokens_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = speed.generation(Clocked("cpu", monkeypatch), IDS, 9)
    assert found == {"first_token_seconds": 1, "decoding_tokens_per_second": 4}


def test_compiling_is_what_the_first_call_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Clocked("cpu", monkeypatch)
    model.device = SimpleNamespace(type="cuda")  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    found = speed.generation(model, IDS, 9)
    assert found == {"first_token_seconds": 1, "decoding_tokens_per_second": 4, "static_first_token_seconds": 1,
                     "static_decoding_tokens_per_second": 16, "compile_seconds": 7}


def test_a_model_that_generates(tiny: Callable[[str], Path]) -> None:
    model: Any = load_original(tiny("llama"))
    found = speed._generation(model, IDS, 3)
    assert set(found) == {"first_token_seconds", "decoding_tokens_per_second"}
    assert all(value > 0 for value in found.values())


def test_what_has_no_speed_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear generates no tokens"):
        speed._generation(torch.nn.Linear(1, 1), IDS, 3)
    for wrong in (1, -1):
        with pytest.raises(ModelError, match=f"found {wrong}"):
            speed.speeds(Path("no"), None, Path("no"), wrong)  # pyright: ignore[reportArgumentType]
