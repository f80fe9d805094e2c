"""The backend: torch finds it, Inductor compiles what it leaves, settings reach Inductor."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from tersor import compiling
from tersor.compiling.products import fuse_products
from tests.compiling.stacking import MANY, ONE, WIDTH, K, Q, drawn, matrix, model_of, stacked, times
from tests.covering import covering
from tests.hf.models.test_compile import IDS

inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


@inductor
def test_results_of_bodies_share_no_memory() -> None:
    """Which operators with several bodies, or of which one runs several times, refuse."""
    other = matrix(64, 21), matrix(32, 22)

    def function(x: Tensor, first: Tensor) -> tuple[Tensor, ...]:  # no sums of numbers: little for g++ to compile
        return torch.cond(first, lambda x: (times(x, Q), times(x, K)),
                          lambda x: (times(x, other[0]), times(x, other[1])), (x,))

    x = drawn(ONE, 1)
    with torch.no_grad():
        assert stacked(function, x, torch.tensor(True)).taken == [4]
        compiled = torch.compile(function, backend="tersor", fullgraph=True, dynamic=False)
        for first in (torch.tensor(True), torch.tensor(False)):
            torch.testing.assert_close(compiled(x, first), function(x, first), rtol=0, atol=1e-5)


def test_torch_finds_the_backend() -> None:
    assert "tersor" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("tersor") is compiling.backend


WAYS = [(ONE, {"mode": "reduce-overhead"}), (ONE, {}), (MANY, {}), (ONE, {"options": {"epilogue-fusion": False}})]
GUARDS = [torch.no_grad, torch.inference_mode]


@inductor
@pytest.mark.parametrize(("shape", "named", "guard"), covering(
    [(*way, GUARDS[number % 2]) for number, way in enumerate(WAYS)],
    [(*way, guard) for way in WAYS for guard in GUARDS]))
def test_inductor(shape: tuple[int, ...], named: dict[str, Any], guard: Callable[[], Any],
                  monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(compiling, "fuse_products", lambda graph: taken.append(fuse_products(graph)))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        x = functional.rms_norm(x, (WIDTH,))
        gate, up = times(x, Q), times(x, Q[::1])
        return functional.silu(gate) * up, times(x, K).view(-1, 8), up.transpose(0, 1)

    with guard():
        x = drawn(shape, 1)
        found = torch.compile(function, backend="tersor", fullgraph=True, dynamic=False, **named)(x)
        torch.testing.assert_close(found, function(x), rtol=0, atol=1e-5)
    assert taken == [3 if shape == ONE else 0]


@inductor
def test_inductor_compiles_a_layer(tmp_path: Path) -> None:
    model = model_of("rot,lm4", "llama", tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=IDS[:1, :1], use_cache=False).logits
        for layer in model.get_submodule("model.layers").children():
            layer.compile(backend="tersor", fullgraph=True, dynamic=False)
        found = model(input_ids=IDS[:1, :1], use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [{"mode": "fastest"}, {"options": {"no_such_option": 1}}])
def test_unknown_settings_are_refused(named: dict[str, Any]) -> None:
    graph = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises((RuntimeError, AttributeError, KeyError), match=r"fastest|no_such_option"):
        compiling.backend(graph, [torch.ones(3)], **named)
