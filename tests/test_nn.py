"""Compressed modules: meta buffers, assigned state dicts, products equal to those of decoded weights."""

import copy

import pytest
import torch
from torch import nn

from tersor.contract.codec import Encoded
from tersor.nn import Buffers, CompressedEmbedding, CompressedLinear, TiedLinear, WeightView
from tersor.registry import parse
from tersor.testing import gaussian, tolerance

SHAPE = (24, 40)


def filled(module: nn.Module, encoded: Encoded, prefix: str = "weight") -> None:
    state = {f"{prefix}/{key}": tensor for key, tensor in encoded.tensors.items()}
    module.load_state_dict(state, strict=False, assign=True)


@pytest.fixture(params=["rot,lm3", "rtn4g16", "rows5(lm3;lm2)"])
def encoded(request: pytest.FixtureRequest) -> Encoded:
    return parse(request.param).encode(gaussian(SHAPE, 0))


def test_linear_is_meta_until_assigned_and_equals_decoded(encoded: Encoded) -> None:
    layer = CompressedLinear(encoded.codec, SHAPE, bias=True)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert set(layer.state_dict()) == {f"weight/{key}" for key in encoded.tensors} | {"bias"}
    filled(layer, encoded)
    bias = torch.linspace(-1, 1, SHAPE[0])
    layer.load_state_dict({"bias": bias}, strict=False, assign=True)
    x = gaussian((5, SHAPE[1]), 1)
    expected = nn.functional.linear(x, encoded.decode(), bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=10 * tolerance(torch.float32, SHAPE[1]))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=0, atol=0)


def test_embedding_and_tied_head(encoded: Encoded) -> None:
    table = CompressedEmbedding(encoded.codec, SHAPE, dtype=torch.float32)
    filled(table, encoded)
    ids = torch.tensor([[3, 3], [0, 23]])
    dense = encoded.decode()
    torch.testing.assert_close(table(ids), dense[ids], rtol=0, atol=10 * tolerance(torch.float32, SHAPE[1]))
    head = TiedLinear(table.weight)
    assert not list(head.state_dict())  # the head owns nothing
    x = gaussian((2, SHAPE[1]), 2)
    torch.testing.assert_close(head(x), x @ dense.T, rtol=0, atol=10 * tolerance(torch.float32, SHAPE[1]))


def view_of(encodeds: list[Encoded], shape: tuple[int, ...], *, transposed: bool = False) -> WeightView:
    owner = nn.Module()
    payloads = []
    for i, e in enumerate(encodeds):
        payload = Buffers(owner, f"w/{i}", e.codec, e.shape)
        payload.register("cpu")
        filled(owner, e, f"w/{i}")
        payloads.append(payload)
    return WeightView(payloads, torch.Size(shape), torch.float32, transposed=transposed)


def test_stack_decodes_slices_and_serves_torch_functions() -> None:
    matrices = [parse("lm4").encode(gaussian(SHAPE, seed)) for seed in range(3)]
    view = view_of(matrices, (3, *SHAPE))
    dense = torch.stack([e.decode() for e in matrices])
    torch.testing.assert_close(view[1], dense[1], rtol=0, atol=0)
    torch.testing.assert_close(view[torch.tensor(2)], dense[2], rtol=0, atol=0)
    torch.testing.assert_close(view[torch.tensor([2, 0])], dense[[2, 0]], rtol=0, atol=0)
    x = gaussian((3 * 4, SHAPE[1]), 5).reshape(3, 4, SHAPE[1])
    torch.testing.assert_close(torch.einsum("bni,boi->bno", x, view), torch.einsum("bni,boi->bno", x, dense))
    assert view.size(0) == 3
    assert view.ndim == 3


def test_view_of_a_matrix_computes_on_the_encoded_form() -> None:
    e = parse("rot,lm3").encode(gaussian(SHAPE, 0))
    view, dense = view_of([e], SHAPE), e.decode()
    x, bias = gaussian((2, SHAPE[1]), 1), torch.ones(SHAPE[0])
    atol = 10 * tolerance(torch.float32, SHAPE[1])
    torch.testing.assert_close(nn.functional.linear(x, view, bias), nn.functional.linear(x, dense, bias),
                               rtol=0, atol=atol)
    ids = torch.tensor([1, 5])
    torch.testing.assert_close(nn.functional.embedding(ids, view), dense[ids], rtol=0, atol=atol)
    turned = view_of([e], SHAPE[::-1], transposed=True)
    torch.testing.assert_close(turned.decode(), dense.T, rtol=0, atol=0)
    torch.testing.assert_close(torch.mm(x, turned), x @ dense.T, rtol=0, atol=atol)


def test_shared_tables_are_registered_once() -> None:
    codec = parse("tab3")
    a, b = gaussian(SHAPE, 0), gaussian(SHAPE, 1)
    tables = codec.train([a, b])
    root = nn.Module()
    places = {"table": (root, "shared/x/table")}
    layers = [CompressedLinear(codec, SHAPE, bias=False, shared=places) for _ in range(2)]
    assert list(root.state_dict()) == ["shared/x/table"]
    assert all(set(layer.state_dict()) == {"weight/codes", "weight/scales"} for layer in layers)
    root.load_state_dict({"shared/x/table": tables["table"]}, assign=True)
    x = gaussian((2, SHAPE[1]), 3)
    for layer, matrix in zip(layers, (a, b), strict=True):
        e = codec.encode(matrix, tables=tables)
        layer.load_state_dict({f"weight/{k}": e.tensors[k] for k in ("codes", "scales")}, assign=True)
        torch.testing.assert_close(layer(x), e.matmul(x), rtol=0, atol=0)
