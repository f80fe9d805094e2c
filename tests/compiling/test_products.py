"""Which products of a graph become one call, and that the compiled code computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tersor.compiling.products import fuse_products
from tests.compiling.stacking import (
    FUSED,
    MANY,
    ONE,
    PRODUCT,
    SECOND,
    TABLE,
    WIDTH,
    K,
    Q,
    Stacking,
    V,
    drawn,
    matrix,
    model_of,
    stacked,
    times,
)
from tests.covering import covering
from tests.hf.models.test_compile import IDS

ONE_ID = IDS[:1, :1]
STATES = drawn((4, WIDTH), 12) + 3


class Layer(torch.nn.Module):
    """Products with buffers: unlike other tensors, they have the same shapes in every run."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in zip(("q", "q_scales", "k", "k_scales", "v", "v_scales"), (*Q, *K, *V), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> list[Tensor]:
        own = list(self.buffers())
        return [times(x, of) for of in zip(own[::2], own[1::2], strict=True)]


LAYERS = [("rot,lm4", "llama", 7, 4, 1), ("rot,lm4", "qwen2", 7, 4, 1), ("rot,lm4", "gemma", 7, 4, 1),
          ("rtn4s", "llama", 7, 4, 1), ("rot,lm4", "gpt2", 0, 0, 1), ("rot,fit4", "llama", 2, 2, 1),
          ("rtn4g16", "llama", 0, 0, 1), ("rtn4", "llama", 0, 0, 1), ("rot,lm4", "llama", 0, 0, 18)]
MANY_TOO = [("rot,lm4", "qwen2", 0, 0, 18), ("rot,lm4", "gemma", 0, 0, 18), ("rot,lm4", "gpt2", 0, 0, 18),
            ("rtn4s", "llama", 0, 0, 18)]  # of many vectors nothing is joined, whatever the codec


@pytest.mark.parametrize(("codec", "architecture", "taken", "calls", "vectors"), covering(LAYERS, LAYERS + MANY_TOO))
def test_layers_of_models(codec: str, architecture: str, taken: int, calls: int, vectors: int, tmp_path: Path) -> None:
    """One vector's queries, keys and values are one call, gate and up are one, sums join; not with zero points."""
    model, counting, ids = model_of(codec, architecture, tmp_path), Stacking(), ONE_ID if vectors == 1 else IDS
    layers = model.get_submodule("transformer.h" if architecture == "gpt2" else "model.layers")
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        for layer in layers.children():
            layer.compile(backend=counting, fullgraph=True, dynamic=False)
        found = model(input_ids=ids, use_cache=False).logits
    assert counting.taken == [taken]
    assert counting.calls[FUSED.default] == calls
    assert counting.calls[PRODUCT.default] == (4 if architecture == "gpt2" else 7) - taken
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [ONE, MANY, (WIDTH,), (0, WIDTH), (2, WIDTH)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_products_are_as_before(shape: tuple[int, ...], dynamic: bool) -> None:
    """Also for code that asks for views of other shapes. Only what is one vector in every run is one call."""
    def function(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = layer(x)
        return q.view(-1), k.view(*x.shape[:-1], 4, 8).transpose(0, -1), v + 1, v.view(-1, 16)

    layer, one = Layer(), shape in (ONE, (WIDTH,))
    found = stacked(function, drawn(shape, 1), dynamic=dynamic)
    assert found.taken == [3 if one else 0]
    assert found.calls[FUSED.default] == one


def test_tensors_of_any_number_of_rows_are_apart() -> None:
    assert stacked(lambda x: (times(x, Q), times(x, K)), drawn(ONE, 1), dynamic=True).taken == [0]


@pytest.mark.parametrize("change", [{"bits": 2}, {"rotation": None}, {"rotation": 8}, {"form": "symmetric"},
                                    {"table": TABLE.clone()}, {"zeros": True}, {"group": 16}], ids=str)
def test_products_that_differ_are_apart(change: dict[str, Any]) -> None:
    other = matrix(32, 4, change.get("bits", 4), WIDTH // change.get("group", WIDTH))
    if "zeros" in change:
        change = {"zeros": torch.full((16,), 0x21, dtype=torch.uint8)}
    found = stacked(lambda x: (times(x, Q), times(x, other, **change)), drawn(ONE, 1))
    assert found.taken == [0]
    assert found.calls[PRODUCT.default] == 2


def test_products_of_other_vectors_are_apart() -> None:
    found = stacked(lambda x: (times(x, Q), times(x + 1, K), times(x, V)), drawn(ONE, 1))
    assert found.taken == [2]
    assert found.calls[PRODUCT.default] == 1
    assert stacked(lambda x, y: (times(x, Q), times(y, K)), drawn(ONE, 1), drawn(ONE, 2)).taken == [0]


def test_scales_of_other_types_are_apart() -> None:
    other = K[0], K[1].float()
    assert stacked(lambda x: (times(x, Q), times(x, other)), drawn(ONE, 1)).taken == [0]


def _add_assign(x: Tensor) -> None:
    x += 1


def _set(x: Tensor) -> None:
    x[0] = 1.0


@torch.library.custom_op("tersor_tests::twice", mutates_args=("x",))
def _twice(x: Tensor) -> None:
    x.mul_(2)


@pytest.mark.parametrize("write", [
    lambda x: x.add_(1), lambda x: x[0].mul_(2), lambda x: x.view(-1)[1:].zero_(), _add_assign, _set, _twice,
    lambda x: x.__iadd__(2), lambda x: functional.relu(x, inplace=True), lambda x: functional.relu(x, True),
    lambda x: torch.mul(x, 2, out=x), lambda x: torch.relu_(x), lambda x: torch._foreach_add_([x], 1),
    lambda x: x.T.copy_(x.T + 1), lambda x: functional.normalize(x + 1, 2.0, -1, 1e-12, x),
    lambda x: functional.batch_norm(STATES, x.view(-1), torch.ones(WIDTH), training=True),
    lambda x: functional.embedding(torch.zeros(1, dtype=torch.int64), x, max_norm=1.0)])
def test_vectors_that_change_in_between(write: Callable[[Tensor], Any]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        q = times(x, Q)
        write(x)
        return q, times(x, K), times(x, V)

    found = stacked(function, drawn((1, WIDTH), 1))
    assert found.taken == [2]  # those after the write
    assert found.calls[PRODUCT.default] == 1


def test_scales_that_change_in_between() -> None:
    def function(x: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        q = times(x, Q)
        scales.mul_(2)
        return q, times(x, (K[0], scales))

    assert stacked(function, drawn(ONE, 1), K[1]).taken == [0]


def test_what_only_reads_may_stand_in_between() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        q = functional.dropout(functional.silu(times(x, Q)).contiguous().view(-1, 64), 0.1, False)
        mask = (q > 0) & (q < 1)
        with torch.no_grad():
            k = times(x, K)
        return torch.softmax(q, -1)[..., :2], mask, k

    assert stacked(function, drawn(ONE, 1)).taken == [2]


def test_what_is_computed_too_late_is_left_out() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        q = times(x, Q)
        return q, times(x, (K[0], K[1] * q[0, 0, 0].to(torch.bfloat16))), times(x, V)

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [2]
    assert found.calls[PRODUCT.default] == 1


def test_stacks_of_stacks() -> None:
    """The vectors of a stack are a product of another."""
    def function(x: Tensor) -> tuple[Tensor, ...]:
        first, second = times(x, Q), times(x, Q)
        return times(first, Q), times(first, V), times(second, K), times(second, V)

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [6]
    assert (found.calls[FUSED.default], found.calls[PRODUCT.default]) == (3, 0)


def test_rotations_of_each_run_are_apart() -> None:
    counting, buffers = Stacking(), Layer()

    def function(x: Tensor, seed: int) -> tuple[Tensor, ...]:
        return (times(x, (buffers.q, buffers.q_scales), rotation=seed),
                times(x, (buffers.k, buffers.k_scales), rotation=seed))

    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    for seed in (3, 5):
        x = drawn(ONE, 1)
        torch.testing.assert_close(compiled(x, seed), function(x, seed), rtol=0, atol=1e-5)
    assert set(counting.taken) == {0}


@pytest.mark.parametrize("transformed", [
    lambda x: torch.vmap(lambda e: (times(e, Q), times(e, K)))(x),
    lambda x: torch.vmap(lambda e: (e + times(e + 1, SECOND)))(x),
    lambda x: torch.func.jvp(lambda e: e + times(x + 1, SECOND), (x,), (2 * x,))])
def test_transformed_functions_stay(transformed: Callable[[Tensor], Any]) -> None:
    found = stacked(transformed, drawn((1, WIDTH), 1))
    assert found.taken == [0]


def test_bodies_of_operators() -> None:
    found = stacked(lambda x: checkpoint(lambda x: (times(x, Q), times(x, K)), x, use_reentrant=False), drawn(ONE, 1))
    assert found.taken == [2]
    assert found.calls[FUSED.default] == 1


def test_attributes_and_packets() -> None:
    """A graph of another tracer: tensors are attributes, read late and twice, and examples have another name."""
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return times(x, Q), times(x, K), times(x, V)

    x = drawn(ONE, 1)
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    products = [node for node in graph.graph.nodes if node.target is PRODUCT.default]
    products[1].target = PRODUCT
    for product in products:  # each reads its tensors itself, and late
        for node in product.args[1:4]:
            with graph.graph.inserting_before(product):
                read = graph.graph.get_attr(node.target)
            read.meta["val"] = product.meta["val"].fake_mode.from_tensor(getattr(graph, node.target))
            product.replace_input_with(node, read)
    assert fuse_products(graph) == 3
    assert {node.target for node in graph.graph.nodes} & {PRODUCT, PRODUCT.default} == set()
    torch.testing.assert_close(graph(x), function(x), rtol=0, atol=0)


def test_examples_of_new_nodes() -> None:
    graphs = []

    def keep(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        fuse_products(graph)
        graphs.append((graph, inputs))
        return graph.forward

    torch.compile(lambda x: (times(x, Q), times(x, K)), backend=keep, dynamic=False)(drawn(ONE, 1))
    (graph, inputs), = graphs
    found: dict[str, Tensor] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = result = super().run_node(n)
            return result

    Run(graph).run(*inputs)
    calls = [node for node in graph.graph.nodes if node.op.startswith("call_")]
    assert len(calls) == 3
    for node in calls:
        example, result = node.meta["example_value"], found[node.name]
        assert (example.shape, example.stride(), example.dtype) == (result.shape, result.stride(), result.dtype)
        assert "stack_trace" in node.meta


def test_graphs_without_examples_stay() -> None:
    graph = fx.symbolic_trace(lambda x: (PRODUCT(x, *Q[:1], TABLE, Q[1], None, 4, WIDTH),
                                         PRODUCT(x, *K[:1], TABLE, K[1], None, 4, WIDTH)))
    before = graph.code
    assert fuse_products(graph) == 0
    assert graph.code == before
