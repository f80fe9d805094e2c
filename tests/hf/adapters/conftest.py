"""Tiny models, compressed once a session and loaded anew for each test; what training needs besides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.hf import compress_model
from tests.hf.tiny import save_tiny, save_tokenizer

LOAD = Callable[..., Any]
IDS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Folders of a tiny model and of its store, by architecture."""
    made: dict[Any, tuple[Path, Path]] = {}

    def get(name: str = "llama", rate: float = 4.5, dtype: torch.dtype = torch.float32,
            **settings: Any) -> tuple[Path, Path]:
        key = name, rate, dtype, repr(sorted(settings.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            save_tokenizer(save_tiny(name, folder / "model", dtype))
            given = {"method": "rotated_scalar", "calibrated": False, **settings}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *given: None)
                compress_model(folder / "model", folder / "out", rate, evaluation_tokens=0, **given)
            made[key] = folder / "model", folder / "out"
        return made[key]

    return get


@pytest.fixture
def load(compressed: Callable[..., tuple[Path, Path]]) -> LOAD:
    """What loads a compressed model as its users do."""
    from transformers import AutoModelForCausalLM

    return lambda name="llama", dtype=torch.float32, **given: AutoModelForCausalLM.from_pretrained(
        compressed(name, **given)[1], dtype=dtype)


def drawn(model: nn.Module, scale: float = 0.02) -> None:
    """Give all adapters numbers of their own, since they begin as nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
