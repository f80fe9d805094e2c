"""A step that is not one graph is compiled with all its guards, and is not taken by Tersor's loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.hf.models.generating import compiled
from tersor.hf.models.stepping import DeclinedError
from tests.hf.tiny import load_original, save_tiny


class Untraced(nn.Module):
    """Adds its number, by what a compiler does not trace."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    @torch.compiler.disable
    def _added(self, x: Tensor) -> Tensor:
        return x + self.number

    def forward(self, x: Tensor) -> Tensor:
        return self._added(x * 2)


@pytest.fixture
def model(tmp_path: Any) -> Any:
    torch._dynamo.reset()
    found: Any = load_original(save_tiny("llama", tmp_path / "llama"))
    for number, layer in enumerate(found.model.layers):
        layer.mlp.act_fn = Untraced(float(number))
    return found


def test_it_is_declined(model: Any) -> None:
    with torch.no_grad(), pytest.raises(DeclinedError, match="a step is not one graph"):
        compiled(model)(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_transformers_loop_compiles_its_parts_with_all_guards(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.hf.models import generating

    monkeypatch.setattr(generating, "backend", lambda graph, inputs, mode: graph.forward)
    ids = torch.arange(1, 5)[None]
    call = generating.CompiledCall(model)(None)
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(call(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
