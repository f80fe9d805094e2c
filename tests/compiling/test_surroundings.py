"""Which norms before products, and sums and gates after them, join their calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.compiling.stacking import (
    MANY,
    ONE,
    PRODUCT,
    SECOND,
    WEIGHT,
    WIDTH,
    K,
    Q,
    Stacking,
    drawn,
    joined,
    matrix,
    normed,
    stacked,
    times,
)
from tests.hf.models.test_compile import IDS, compressed
from tests.hf.tiny import save_tiny

THIRD, ROW = matrix(WIDTH, 10), matrix(1, 11)


@torch.compiler.allow_in_graph
def rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor) -> Tensor:
    """Return what is none, of a name that torch has too."""
    del shape
    return x + weight


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


def _core(wide: Tensor) -> Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * WEIGHT


def gemmas(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(torch.square(wide).mean(-1, keepdim=True) + 1e-5) * (1.0 + WEIGHT)).type_as(x)


def by_product(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean((-1,), keepdim=True) + 1e-5) * WEIGHT


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
