"""`generate` over a static cache: a compressed model compiles by itself, by Tersor's backend, in one graph."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from transformers import CompileConfig

from tersor import compiling
from tersor.hf.models import generating
from tersor.hf.models.generating import CompiledCall, Steps, compiles
from tests.compiling.stacking import model_of
from tests.covering import covering

IDS = torch.randint(0, 128, (1, 9), generator=torch.Generator().manual_seed(1))
CODECS = ["rot,lm4", "rows20(rot,tr3x9o;rot,tr2x8o)", "rot,tr2x8", "rot,tr3x9o", "rot,tr2nx8", "two2x2"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def rewritten(found: list[fx.GraphModule], then: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backend that rewrites graphs as Tersor's does, and keeps them."""
    def taken(graph: fx.GraphModule, inputs: list[Any], *, mode: str) -> Callable[..., Any]:
        assert mode == "reduce-overhead"
        compiling.tell_apart(graph)
        compiling.fuse_products(graph)
        compiling.join_attention(graph)
        found.append(graph)
        return then(graph, inputs)

    return taken


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Let the backend rewrite graphs, and run them as they are then."""
    found: list[fx.GraphModule] = []
    monkeypatch.setattr(generating, "backend", rewritten(found, lambda graph, _: graph.forward))
    return found


@pytest.fixture
def functional(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Let what was rewritten go through AOT autograd, too, which takes a fifth of a compilation."""
    found: list[fx.GraphModule] = []
    monkeypatch.setattr(generating, "backend", rewritten(found, torch._dynamo.lookup_backend("aot_eager")))
    return found


def generated(model: Any, ids: Tensor = IDS, *, compiled: bool = True, new: int = 6, **named: Any) -> Tensor:
    """Generate greedily over a static cache, as on a device that transformers compiles for."""
    model._valid_auto_compile_criteria = lambda *_: compiled
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=new, do_sample=False, cache_implementation="static", **named)


def called(graph: fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("codec", covering(CODECS[:2], CODECS))
def test_a_step_is_one_graph(codec: str, functional: list[fx.GraphModule], tmp_path: Path) -> None:
    model: Any = model_of(codec, "llama", tmp_path, num_hidden_layers=2 if codec == CODECS[0] else 1)
    assert model.hf_quantizer.is_compileable
    assert torch.equal(generated(model), generated(model, compiled=False))
    assert not counters["graph_break"]
    assert len(functional) == 1
    assert called(functional[0], "attend_one") == model.config.num_hidden_layers
    assert called(functional[0], "scaled_dot_product_attention") == 0
    generated(model)
    assert len(functional) == 1


@pytest.mark.parametrize("codec", covering(["rot,tr3x9o"], ["rot,lm4", "rot,tr3x9o"]))
def test_payloads_stay_where_they_are(codec: str, graphs: list[fx.GraphModule], tmp_path: Path) -> None:
    """CUDA graphs copy what they do not know to keep its address."""
    generated(model_of(codec, "llama", tmp_path, num_hidden_layers=1))
    held = [node for node in graphs[0].graph.nodes if node.op == "placeholder" and "_buffers_" in node.name]
    assert held
    assert all("_dynamo_static_input_type" in node.meta["tensor_dict"] for node in held)


@pytest.mark.parametrize(("codec", "call", "joined"), [("rot,lm4", "fused_codebook_linear", 2),
                                                       ("rot,tr3x9o", "fused_trellis_product", 4)])
def test_queries_keys_and_values_are_joined(codec: str, call: str, joined: int, graphs: list[fx.GraphModule],
                                            tmp_path: Path) -> None:
    model: Any = model_of(codec, "llama", tmp_path, hidden_size=128, intermediate_size=128, head_dim=32,
                          num_hidden_layers=1)
    generated(model)
    assert called(graphs[0], call) >= joined * model.config.num_hidden_layers


def test_what_changes_in_a_model_is_noticed_at_the_next_call(graphs: list[fx.GraphModule], tmp_path: Path) -> None:
    model: Any = model_of("rot,lm4", "llama", tmp_path, num_hidden_layers=1)
    plain = generated(model)
    with torch.no_grad():
        for name, tensor in model.named_buffers():  # a payload's numbers are no state of a graph
            if name.endswith("layers.0.mlp.down_proj.weight/inner/scales"):
                tensor.mul_(50)
    changed = generated(model)
    assert len(graphs) == 1
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, generated(model, compiled=False))
    before = len(graphs)
    model.model.layers[0].self_attn.scaling *= 3
    assert torch.equal(generated(model), generated(model, compiled=False))
    assert len(graphs) > before
    before = len(graphs)
    model.to(torch.bfloat16)
    assert torch.equal(generated(model, new=2), generated(model, new=2, compiled=False))
    assert len(graphs) > before
    before = len(graphs)
    handle = model.model.layers[0].register_forward_hook(lambda module, given, made: None)
    generated(model, new=2)
    assert len(graphs) > before
    handle.remove()


def test_longer_caches_compile_twice(graphs: list[fx.GraphModule], tmp_path: Path) -> None:
    """The second graph is of any length; that `generate` notes the length on the model is no change of it."""
    model: Any = model_of("rot,lm4", "llama", tmp_path, num_hidden_layers=1)
    for new in (4, 6, 8, 11):
        assert torch.equal(generated(model, new=new), generated(model, new=new, compiled=False))
    assert len(graphs) == 2


def test_another_configuration_is_taken_as_it_is(graphs: list[fx.GraphModule], tmp_path: Path) -> None:
    model: Any = model_of("rot,lm4", "llama", tmp_path, num_hidden_layers=1)
    wanted = generated(model, compiled=False)
    found = generated(model, compile_config=CompileConfig(backend="eager", mode="default"))
    assert torch.equal(found, wanted)
    assert counters["stats"]["unique_graphs"] == 1
    assert graphs == []


def test_copies_compile_for_themselves(graphs: list[fx.GraphModule], tmp_path: Path) -> None:
    model: Any = model_of("rot,lm4", "llama", tmp_path, num_hidden_layers=1)
    other = copy.deepcopy(model)
    assert other.get_compiled_call._model is other
    assert torch.equal(generated(other), generated(model))
    assert len(graphs) == 2
    call = pickle.loads(pickle.dumps(CompiledCall(torch.nn.Linear(1, 1))))  # pyright: ignore[reportArgumentType]
    assert isinstance(call._model, torch.nn.Linear)
    steps = Steps(None)
    assert copy.deepcopy(steps) is steps


def test_plain_calls_warn_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = model_of("rot,lm4", "llama", tmp_path)
    with torch.no_grad():
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert "compile" not in caplog.text
    assert model.generation_config.compile_config is None


def test_weights_that_other_code_takes_are_not_compiled(tmp_path: Path) -> None:
    model: Any = model_of("rot,lm4", "mixtral", tmp_path)
    assert not compiles(model)
    assert not model.hf_quantizer.is_compileable


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_a_step(tmp_path: Path) -> None:
    model: Any = model_of("rows20(rot,tr3x9o;rot,tr2x8o)", "llama", tmp_path)
    assert torch.equal(generated(model, new=3), generated(model, new=3, compiled=False))
    assert not counters["graph_break"]
