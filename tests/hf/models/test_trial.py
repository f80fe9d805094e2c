"""A class is tried before anything is encoded: without weights, and without more than a moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tersor.errors import ModelError
from tersor.hf.models import trial as module
from tersor.hf.models.trial import Trial, trial
from tests.hf.tiny import ARCHITECTURES

SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_most_classes_do_with_stand_ins(name: str) -> None:
    fields = dict(ARCHITECTURES[name])
    assert trial(AutoConfig.for_model(fields.pop("model_type", name), **fields)) == Trial({}, ran=True)


def test_weights_that_are_written_to_stay_dense() -> None:
    found = trial(AutoConfig.for_model("rwkv", **SMALL, attention_hidden_size=64, intermediate_size=96))
    assert found.dense == {f"rwkv.blocks.{i}.{name}.weight": "div_" for i in (0, 1)
                           for name in ("attention.output", "feed_forward.value")}
    assert found.ran


class Fused(nn.Linear):
    """Hands its weight's memory to code that is no torch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.weight.data_ptr()
        return super().forward(input)


def test_weights_whose_memory_is_wanted_stay_dense_in_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(config: Any) -> Any:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
            for layer in model.model.layers:
                layer.mlp.up_proj = Fused(64, 96, bias=False)
        return model

    monkeypatch.setattr(module, "empty_model", empty)
    found = trial(LlamaConfig(**SMALL, intermediate_size=96, num_attention_heads=4))
    assert found == Trial({f"model.layers.{i}.mlp.up_proj.weight": "data_ptr" for i in (0, 1)}, ran=True)


def test_a_class_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "candidates", lambda model, seed: iter([{"spectrum": torch.zeros(1)}]))
    found = trial(LlamaConfig(**SMALL, intermediate_size=96, num_attention_heads=4))
    assert not found.ran
    with pytest.raises(ModelError, match="could not be proven"):
        found.check()
