"""Compressed modules: meta buffers, assigned state dicts, products equal to those of decoded weights."""

import copy
import pickle
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import nn

from tersor.contract.codec import Encoded
from tersor.errors import ReadOnlyError
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


def stand_in(transposed: bool = False) -> tuple[WeightView, torch.Tensor]:
    e = parse("rot,lm3").encode(gaussian(SHAPE, 0))
    dense = e.decode()
    return view_of([e], SHAPE[::-1] if transposed else SHAPE, transposed=transposed), dense.T if transposed else dense


ASKED = {  # what code asks a weight, and how the answer is to be had from the dense one
    "T": lambda w: w.T, "mT": lambda w: w.mT, "t": lambda w: w.t(), "transpose": lambda w: w.transpose(0, 1),
    "data": lambda w: w.data, "detach": lambda w: w.detach(), "clone": lambda w: w.clone(),
    "float": lambda w: w.float(), "to": lambda w: w.to(torch.float64), "rows": lambda w: w[2:5], "row": lambda w: w[3],
    "mask": lambda w: w[w > 0],
    "add": lambda w: w + 1, "radd": lambda w: 1 + w, "neg": lambda w: -w, "pow": lambda w: w**2, "lt": lambda w: w < 0,
    "abs": abs, "sum": lambda w: w.sum(0), "norm": torch.linalg.norm, "chunk": lambda w: w.chunk(2)[1],
    "cat": lambda w: torch.cat([w, w]), "stack": lambda w: torch.stack((w, w), dim=1),
    "nested": lambda w: torch.block_diag(w, w), "out": lambda w: torch.add(w, w, out=torch.empty(w.shape)),
    "into": lambda w: torch.zeros(w.shape).copy_(w), "accumulate": lambda w: torch.zeros(w.shape).add_(w, alpha=2.0),
    "at": lambda w: torch.ones(3, w.shape[0]) @ w, "times T": lambda w: torch.ones(3, w.shape[1]) @ w.T,
    "mm": lambda w: torch.mm(torch.ones(3, w.shape[1]), w.t()), "addmm": lambda w: torch.addmm(
        torch.ones(w.shape[1]), torch.ones(3, w.shape[0]), w), "vector": lambda w: torch.ones(w.shape[1]) @ w.T,
    "einsum": lambda w: torch.einsum("bi,oi->bo", torch.ones(3, w.shape[1]), w),
    "linear": lambda w: nn.functional.linear(torch.ones(3, w.shape[1]), weight=w),
    "renormed": lambda w: nn.functional.embedding(torch.tensor([1, 5]), w, max_norm=0.5),
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()), "array": lambda w: torch.tensor(numpy.asarray(w)),
    "iterate": lambda w: torch.stack(list(w)), "list": lambda w: torch.tensor(w.tolist()),
    "functional": lambda w: nn.functional.normalize(w, dim=-1), "vmap": lambda w: torch.vmap(torch.sum)(w + 0),
    "item": lambda w: torch.tensor(w[0, 0].item()), "view": lambda w: w.view(-1), "permute": lambda w: w.permute(1, 0),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_the_stand_in_answers_as_a_tensor(asked: str, transposed: bool) -> None:
    view, dense = stand_in(transposed)
    try:
        want = ASKED[asked](dense)
    except RuntimeError as error:  # a transposed tensor has no flat view
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            ASKED[asked](view)
        return
    found = ASKED[asked](view)
    torch.testing.assert_close(found + 0 if isinstance(found, WeightView) else found, want, rtol=1e-5, atol=1e-4)


FACTS = ["shape", "dtype", "device", "ndim", "requires_grad", "grad", "is_cuda", "is_meta", "is_leaf", "layout",
         "itemsize", "nbytes", "is_sparse"]
CALLS = ["size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "__len__", "get_device", "stride"]


def test_facts_need_no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    view, dense = stand_in()
    monkeypatch.setattr(WeightView, "decode", lambda self: pytest.fail("decoded"))
    assert {name: getattr(view, name) for name in FACTS} == {name: getattr(dense, name) for name in FACTS}
    assert {name: getattr(view, name)() for name in CALLS} == {name: getattr(dense, name)() for name in CALLS}
    assert isinstance(view, torch.Tensor)
    assert isinstance(view, nn.Parameter)
    assert torch.is_tensor(view)
    assert "rot" in repr(view)
    x = gaussian((2, SHAPE[1]), 1)
    torch.testing.assert_close(x @ view.T, view.payloads[0].encoded().matmul(x))


@pytest.mark.parametrize("change", [
    lambda w: w.mul_(2), lambda w: w.copy_(torch.ones(SHAPE)), lambda w: nn.init.normal_(w),
    lambda w: w.__setitem__(0, 1), lambda w: torch.mul(torch.ones(SHAPE), 2, out=w), lambda w: w.__iadd__(1),
    lambda w: setattr(w, "data", torch.ones(1)), lambda w: w.requires_grad_(), lambda w: w.T.zero_(),
    lambda w: w.data_ptr(), lambda w: torch.zero_(w)])
def test_what_would_change_it_is_refused(change: Callable[[WeightView], object]) -> None:
    view, dense = stand_in()
    with pytest.raises(ReadOnlyError, match="encoded weight"):
        change(view)
    assert torch.equal(view + 0, dense)
    view.requires_grad_(False)
    view.requires_grad = False


def test_the_stand_in_is_copied_and_pickled_with_its_module(encoded: Encoded) -> None:
    layer = CompressedLinear(encoded.codec, SHAPE, bias=False)
    filled(layer, encoded)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight.payloads[0].owner is other
        assert torch.equal(other.weight + 0, encoded.decode())
