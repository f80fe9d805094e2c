"""Gradients of products, where torch asks for them: alone, in layers, checkpointed, compiled, to second order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tersor
from tersor.contract.codec import Codec, Encoded
from tersor.nn import Buffers, CompressedLinear, TiedLinear, WeightView
from tersor.registry import parse
from tersor.testing import encode, gaussian, tolerance

CODECS = ("rtn4g16", "lm4", "rot,lm3", "two2x2", "rot,sym16", "pq4x8", "lr4(bf16;bf16)", "kashin4co",
          "sum(rot,lm2;rtn2)", "std,two2x2o")
AROUND = ("rotboth,lm3", "two2x2o", "kashin2mdense", "std,two2x2o")  # of which a decoded row costs the whole matrix
OUT, IN = 24, 32


@pytest.fixture(autouse=True)
def _few_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.codecs.bases.two_basis.SWEEPS", 5)


def encoded_by(text: str) -> Encoded:
    return encode(parse(text), gaussian((OUT, IN), 1))


def gradient(multiply: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the gradient by fixed vectors of a product's sum of squares, and the product."""
    x = gaussian((3, IN), 2).requires_grad_()
    y = multiply(x)
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad, y.detach()


def close(found: Tensor, weight: Tensor) -> bool:
    """Tell whether a gradient is that of the sum of squares of products with a dense matrix."""
    x, wide = gaussian((3, IN), 2).double(), weight.double()
    want = 2.0 * (x @ wide.T) @ wide
    return float((found.double() - want).norm()) <= 2 * tolerance(torch.float32, OUT + IN) * float(
        x.norm() * wide.norm() ** 2)


@pytest.mark.parametrize("text", CODECS)
def test_layers(text: str) -> None:
    """A linear, a head tied to an embedding, and code that takes a weight and multiplies by itself."""
    held = encoded_by(text)
    linear = CompressedLinear(held.codec, held.shape, bias=True, device="cpu")
    for name, tensor in held.tensors.items():
        linear.get_buffer(f"weight/{name}").copy_(tensor)
    nn.init.zeros_(linear.bias)
    view = WeightView([Buffers(linear, "weight", held.codec, held.shape)], torch.Size(held.shape), torch.float32)
    for multiply in (linear, TiedLinear(view), lambda x: nn.functional.linear(x, linear.weight),  # type: ignore[arg-type]
                     lambda x: x @ view.decode().T):
        found, _ = gradient(multiply)
        assert close(found, held.decode())


@pytest.mark.parametrize("text", CODECS)
def test_nothing_is_kept_for_it(text: str) -> None:
    """A product is linear: neither the vectors nor a decoded block outlive the forward pass."""
    held, kept = encoded_by(text), []
    x = gaussian((3, IN), 2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        y = held.matmul(x)
    assert y.requires_grad
    assert kept == []


@pytest.mark.parametrize("text", CODECS)
def test_nothing_is_recorded_where_nobody_asks(text: str) -> None:
    held, x = encoded_by(text), gaussian((3, IN), 2).requires_grad_()
    assert not held.matmul(x.detach()).requires_grad
    with torch.no_grad():
        assert not held.matmul(x).requires_grad
    with torch.inference_mode():
        inside = tersor.compress(gaussian((OUT, IN), 1), codec=text)
        product = inside.matmul(x)
        assert torch.equal(product, held.matmul(x.detach()))
    found, _ = gradient(inside.matmul)  # what was encoded in inference serves training
    assert close(found, held.decode())


@pytest.mark.parametrize("text", ["lm4", "two2x2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(text: str, reentrant: bool) -> None:
    held = encoded_by(text)
    found, _ = gradient(lambda x: checkpoint(lambda x: held.matmul(torch.tanh(torch.atanh(x / 10.0))) * 10.0, x,
                                             use_reentrant=reentrant))  # type: ignore[arg-type]
    assert close(found, held.decode())


@pytest.mark.parametrize("text", ["rtn4g16", "rot,lm4", "two2x2", "two2x2h", "pq4x8", "lr4(bf16;bf16)"])
def test_compiled(text: str) -> None:
    held = encoded_by(text)
    found, _ = gradient(torch.compile(lambda x: held.matmul(x) * 1.0, backend="aot_eager", fullgraph=True))
    assert close(found, held.decode())


@pytest.mark.parametrize("text", CODECS)
def test_second_order(text: str) -> None:
    """Of the sum of cubes of products: `Wᵀ diag(6 y) W`."""
    held, x = encoded_by(text), gaussian((IN,), 2)
    hessian = torch.autograd.functional.hessian(lambda x: held.matmul(x).pow(3).sum(), x)
    wide = held.decode().double()
    want = wide.T @ (6.0 * (wide @ x.double()).unsqueeze(1) * wide)
    bound = tolerance(torch.float32, 2 * (OUT + IN)) * 6.0 * float(wide.norm() ** 3 * x.norm())
    assert float((hessian.double() - want).norm()) <= bound


@pytest.mark.parametrize("text", [*AROUND, "rows2(lm3;lm2)", "ns,lm2", "id4c(bf16;lm4)", "id4(bf16;lm4)", "opq,pq4x8",
                                  "swap1,lm3", "lr4(lm4o;lm4o)", "lm3o"])
def test_transposed_products_do_not_need_the_whole_matrix(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the decoded matrix whatever the blocks, and where rows do not decode alone they go around."""
    codec: Codec = parse(text)
    held, y = encoded_by(text), gaussian((2, 3, OUT), 3)
    want = y.double() @ held.decode().double()
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 5 * IN)
    if text in AROUND:
        monkeypatch.setattr(type(codec), "decode_rows", lambda *_: pytest.fail("decoded all rows for a block of them"))
    found = codec.matmul_transposed(held, y)
    assert float((found.double() - want).norm()) <= tolerance(torch.float32, OUT + IN) * float(want.norm()) * 4
