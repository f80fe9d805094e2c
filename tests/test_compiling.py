"""`tersor.compiling`: which products of a graph become one call, and that the compiled code computes the same."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tersor import compiling
from tersor.compiling.products import FUSED, PRODUCT, fuse_products
from tersor.ops.codebook_linear import codebook_linear
from tests.hf.models.test_compile import IDS, compressed
from tests.hf.tiny import save_tiny

WIDTH = 512
ONE, MANY = (1, 1, WIDTH), (2, 3, WIDTH)
TABLE = torch.linspace(-2, 2, 16)
inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Stacking:
    """A backend that runs the graph as `fuse_products` leaves it, and remembers."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.calls: Counter[Any] = Counter()
        self.norms = self.sums = self.gates = 0

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        del inputs
        self.taken.append(fuse_products(graph))
        self.calls.update(node.target for module in graph.modules() if isinstance(module, fx.GraphModule)
                          for node in module.graph.nodes)
        made = [node for node in graph.graph.nodes if node.target is FUSED.default]
        self.norms += sum(node.args[1] is not None for node in made)
        self.sums += sum(node.args[5] is not None for node in made)
        self.gates += sum(node.kwargs["gated"] for node in made)
        return graph.forward


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, seed: int = 0, bits: int = 4, groups: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows * WIDTH * bits // 8,), generator=generator).to(torch.uint8)
    return codes, (torch.rand(rows, groups, generator=generator) / WIDTH).to(torch.bfloat16)


STATES = drawn((4, WIDTH), 12) + 3
Q, K, V = matrix(64, 1), matrix(32, 2), matrix(48, 3)


def times(x: Tensor, of: tuple[Tensor, Tensor], **changed: Any) -> Tensor:
    values = {"table": TABLE, "zeros": None, "bits": 4, "group": WIDTH, "form": "any", "rotation": 7, **changed}
    named = {"rotation": values.pop("rotation")}
    table = values.pop("table")
    return codebook_linear(x, of[0], table, of[1], *values.values(), **named)


class Layer(torch.nn.Module):
    """Products with buffers: unlike other tensors, they have the same shapes in every run."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in zip(("q", "q_scales", "k", "k_scales", "v", "v_scales"), (*Q, *K, *V), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> list[Tensor]:
        own = list(self.buffers())
        return [times(x, of) for of in zip(own[::2], own[1::2], strict=True)]


def stacked(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Stacking:
    """Compile, compare with eager, also what is written to inputs, and return what was stacked."""
    counting, mine, others = Stacking(), [one.clone() for one in inputs], [one.clone() for one in inputs]
    found = torch.compile(function, backend=counting, fullgraph=True, dynamic=dynamic)(*mine)
    torch.testing.assert_close(found, function(*others), rtol=0, atol=1e-5)
    torch.testing.assert_close(mine, others, rtol=0, atol=0)
    return counting


def model_of(codec: str, name: str, folder: Path) -> torch.nn.Module:
    return compressed(codec, save_tiny(name, folder / "source"), folder)


@pytest.mark.parametrize(("codec", "architecture", "taken", "calls"), [
    ("rot,lm4", "llama", 7, 4), ("rot,lm4", "qwen2", 7, 4), ("rot,lm4", "gemma", 7, 4), ("rtn4s", "llama", 7, 4),
    ("rot,lm4", "gpt2", 0, 0), ("rot,fit4", "llama", 2, 2), ("rtn4g16", "llama", 0, 0), ("rtn4", "llama", 0, 0)])
@pytest.mark.parametrize("ids", [IDS, IDS[:1, :1]], ids=["many", "one"])
def test_layers_of_models(codec: str, architecture: str, taken: int, calls: int, ids: Tensor, tmp_path: Path) -> None:
    """One vector's queries, keys and values are one call, gate and up are one, sums join; not with zero points."""
    if ids.numel() > 1:
        taken = calls = 0
    model, counting = model_of(codec, architecture, tmp_path), Stacking()
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma"])
def test_norms_of_models_join(architecture: str, tmp_path: Path) -> None:
    """Where layers are wide enough for the kernel to rotate their vectors, both norms and both sums of a layer."""
    source = save_tiny(architecture, tmp_path / "source", hidden_size=WIDTH, num_hidden_layers=1)
    model, counting = compressed("rot,lm4", source, tmp_path), Stacking()
    with torch.no_grad():
        wanted = model(input_ids=IDS[:1, :1], use_cache=False).logits
        model.get_submodule("model.layers.0").compile(backend=counting, fullgraph=True, dynamic=False)
        found = model(input_ids=IDS[:1, :1], use_cache=False).logits
    assert counting.taken == [7]
    assert joined(counting) == (2, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


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


WEIGHT, SECOND, THIRD, ROW = drawn((WIDTH,), 8), matrix(WIDTH, 9), matrix(WIDTH, 10), matrix(1, 11)


def normed(x: Tensor, weight: Tensor = WEIGHT, eps: float = 1e-5, dim: int = -1) -> Tensor:
    """Return what Llama's norm does."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + eps)).to(x.dtype)


def _core(wide: Tensor) -> Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * WEIGHT


def gemmas(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(torch.square(wide).mean(-1, keepdim=True) + 1e-5) * (1.0 + WEIGHT)).type_as(x)


def by_product(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean((-1,), keepdim=True) + 1e-5) * WEIGHT


def joined(found: Stacking) -> tuple[int, int]:
    """Return how many calls hold a norm, and how many a sum."""
    return found.norms, found.sums


@pytest.mark.parametrize("norm", [normed, gemmas, by_product, lambda x: functional.rms_norm(x, (WIDTH,), WEIGHT),
                                  lambda x: _core(x.to(torch.int32).float()),
                                  lambda x: functional.rms_norm(x, (WIDTH,), weight=WEIGHT, eps=0.1)])
def test_norms_join(norm: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = norm(x)
        return times(y, Q), times(y, K)

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [2]
    assert joined(found) == (1, 0)
    assert stacked(function, drawn(MANY, 1)).taken == [0]


@torch.compiler.allow_in_graph
def rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor) -> Tensor:
    """Return what is none, of a name that torch has too."""
    del shape
    return x + weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_an_epsilon_that_torch_chooses_stay(dtype: torch.dtype) -> None:
    """Of 16-bit numbers torch takes one of two, by the kernel."""
    counting = Stacking()
    torch.compile(lambda x: times(functional.rms_norm(x, (WIDTH,), WEIGHT.to(dtype)), Q), backend=counting,
                  fullgraph=True, dynamic=False)(drawn(ONE, 1).to(dtype))
    assert joined(counting) == (0, 0)


def test_norms_of_an_epsilon_of_each_run_stay() -> None:
    counting = Stacking()
    compiled = torch.compile(lambda x, eps: times(functional.rms_norm(x, (WIDTH,), WEIGHT, eps), Q), backend=counting,
                             fullgraph=True, dynamic=True)
    for eps in (0.5, 0.125):
        x = drawn(ONE, 1)
        torch.testing.assert_close(compiled(x, eps), times(functional.rms_norm(x, (WIDTH,), WEIGHT, eps), Q), rtol=0,
                                   atol=1e-5)
    assert joined(counting) == (0, 0)


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


def test_weights_of_norms_may_be_products() -> None:
    """Which other calls stand in the place of then."""
    def function(c: Tensor, x: Tensor) -> Tensor:
        weight, other = times(c, SECOND), times(c, K)
        return times(functional.rms_norm(x, (WIDTH,), weight), Q) + other.sum()

    found = stacked(function, drawn((WIDTH,), 1), drawn((WIDTH,), 2))
    assert found.taken == [3]
    assert joined(found) == (1, 0)


def _changed(x: Tensor) -> Tensor:
    y = normed(x)
    x.add_(1)
    return y


def _changed_early(x: Tensor) -> Tensor:
    """Norm a copy, made by a conversion, of what is written to then."""
    wide = x.to(torch.float64).to(torch.float32)
    x.add_(1)
    return WEIGHT * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("norm", [
    _changed, _changed_early,  # what is normed is written to before the product
    lambda x: WEIGHT * (x * torch.rsqrt(input=torch.mean(input=x.pow(exponent=2), dim=-1, keepdim=True) + 1e-5)),
    lambda x: normed(x, WEIGHT[:1]), lambda x: normed(x, dim=-2), lambda x: normed(x) + 1, lambda x: normed(x, eps=1),
    lambda x: WEIGHT * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-5)),
    lambda x: WEIGHT * ((x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    lambda x: WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).mul(2) + 1e-5)),
    lambda x: functional.rms_norm(x, (WIDTH,)), lambda x: functional.layer_norm(x, (WIDTH,), WEIGHT),
    # conversions that lose more than a rounding to the dtype of x
    lambda x: _core(x).to(torch.int8).to(x.dtype),
    lambda x: _core(x.to(torch.float8_e4m3fn).float()), lambda x: _core(x.half().float()),
    lambda x: WEIGHT * (x * torch.rsqrt((x.pow(2).mean(-1, keepdim=True) + 1).to(torch.int32))),
    lambda x: x * torch.rsqrt(torch.masked.mean(x * x, -1, keepdim=True, mask=x > 0) + 1e-5) * WEIGHT,
    lambda x: rms_norm(x, (WIDTH,), WEIGHT)])
def test_other_norms_stay(norm: Callable[[Tensor], Tensor]) -> None:
    found = stacked(lambda x: (lambda y: (times(y, Q), times(y, K)))(norm(x)), drawn(ONE, 1))
    assert found.taken == [2]
    assert joined(found) == (0, 0)


def test_norms_of_vectors_that_the_kernel_does_not_rotate_stay() -> None:
    found = stacked(lambda x: [times(normed(x), Q, rotation=None)], drawn(ONE, 1))
    assert found.taken == [0]


def test_sums_join() -> None:
    """A residual stream: each product is added to it, and the norm before the next one reads it."""
    def function(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + times(normed(x), SECOND).view(ONE).contiguous()
        return torch.add(times(functional.silu(x), SECOND, rotation=None), x) + x

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [3]
    assert joined(found) == (2, 3)
    assert found.calls[PRODUCT.default] == 0


@pytest.mark.parametrize("total", [
    lambda x, y: torch.add(x, y, alpha=2), lambda x, y: x[..., :1] + y, lambda x, y: x.double() + y, lambda x, y: y + 1,
    lambda x, y: x.view(-1) + y.view(-1), lambda x, y: y + y, lambda x, y: (x + y) * y, lambda x, y: x - y,
    lambda x, y: torch.relu(y) + y, lambda x, y: x.add_(1) + y])
def test_other_sums_stay(total: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = stacked(lambda x: total(x, times(x + 1, SECOND)), drawn(ONE, 1))
    assert found.taken == [0]


@pytest.mark.parametrize("gate", [
    lambda one, two: functional.silu(one) * two,
    lambda one, two: two.view(1, 1, -1) * functional.silu(one.view(1, 1, -1)),
    lambda one, two: functional.silu(two).to(torch.float32) * one])
def test_gates_join(gate: Callable[[Tensor, Tensor], Tensor]) -> None:
    def function(x: Tensor) -> Tensor:
        y = normed(x)
        return x + times(gate(times(y, SECOND), times(y, THIRD)), SECOND)

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [3]
    assert (found.gates, *joined(found)) == (1, 1, 1)
    assert found.calls[PRODUCT.default] == found.calls[functional.silu] == 0


@pytest.mark.parametrize("gate", [
    lambda one, two: functional.silu(one) * two + one, lambda one, two: functional.relu(one) * two,
    lambda one, two: functional.silu(one) + two, lambda one, two: functional.silu(one) * functional.silu(two),
    lambda one, two: functional.silu(one) * two * two, lambda one, two: functional.silu(one) * one + two,
    lambda one, two: (functional.silu(one) * two, functional.silu(one))])
def test_other_gates_stay(gate: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = stacked(lambda x: gate(times(x, SECOND), times(x, THIRD)), drawn(ONE, 1))
    assert found.gates == 0


def test_gates_of_other_shapes_stay() -> None:
    found = stacked(lambda x: functional.silu(times(x, SECOND)) * times(x, ROW), drawn(ONE, 1))
    assert found.taken == [2]
    assert found.gates == 0


def test_what_is_added_must_be_there() -> None:
    assert stacked(lambda x: (lambda y: x.square() + y)(times(x + 1, SECOND)), drawn(ONE, 1)).taken == [0]


def test_sums_with_what_learns_stay() -> None:
    """As adapters beside frozen matrices: the product has no gradient, the sum has."""
    def residual(x: Tensor, r: Tensor) -> Tensor:
        return r + times(x, SECOND)

    def gradient(one: Callable[..., Any]) -> Tensor:
        r = drawn(ONE, 2).requires_grad_()
        found, = torch.autograd.grad(one(drawn(ONE, 1), r).square().sum(), r)
        return found

    counting = Stacking()
    found = gradient(torch.compile(residual, backend=counting, fullgraph=True, dynamic=False))
    torch.testing.assert_close(found, gradient(residual))
    assert counting.taken == [0]


@pytest.mark.parametrize("transformed", [
    lambda x: torch.vmap(lambda e: (times(e, Q), times(e, K)))(x),
    lambda x: torch.vmap(lambda e: (e + times(e + 1, SECOND)))(x),
    lambda x: torch.func.jvp(lambda e: e + times(x + 1, SECOND), (x,), (2 * x,))])
def test_transformed_functions_stay(transformed: Callable[[Tensor], Any]) -> None:
    found = stacked(transformed, drawn((1, WIDTH), 1))
    assert found.taken == [0]


@inductor
def test_results_of_bodies_share_no_memory() -> None:
    """Which operators with several bodies, or of which one runs several times, refuse."""
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return torch.cond(x.sum() > 0, lambda x: (times(x, Q), times(x, K)),
                          lambda x: (times(x, Q) + 1, times(x, K) + 1), (x,))

    x = drawn(ONE, 1)
    with torch.no_grad():
        assert stacked(function, x).taken == [4]
        found = torch.compile(function, backend="tersor", fullgraph=True, dynamic=False)(x)
        torch.testing.assert_close(found, function(x), rtol=0, atol=1e-5)


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


def test_torch_finds_the_backend() -> None:
    assert "tersor" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("tersor") is compiling.backend


@inductor
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("shape", "named"), [(ONE, {"mode": "reduce-overhead"}), (ONE, {}),
                                              (ONE, {"options": {"epilogue-fusion": False}})])
def test_inductor(guard: Callable[[], Any], shape: tuple[int, ...], named: dict[str, Any],
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
    assert taken == [3]


@inductor
def test_inductor_compiles_a_layer(tmp_path: Path) -> None:
    model = model_of("rot,lm4", "llama", tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        for layer in model.get_submodule("model.layers").children():
            layer.compile(backend="tersor", fullgraph=True, dynamic=False)
        found = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [{"mode": "fastest"}, {"options": {"no_such_option": 1}}])
def test_unknown_settings_are_refused(named: dict[str, Any]) -> None:
    graph = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises((RuntimeError, AttributeError, KeyError), match=r"fastest|no_such_option"):
        compiling.backend(graph, [torch.ones(3)], **named)
