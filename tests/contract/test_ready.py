"""Products made ready: the bits of `Encoded.matmul`, whatever is around the call and whatever became of the payload."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.contract.codec import Encoded
from tersor.nn import CompressedLinear
from tersor.ops.dispatch import reference_only
from tersor.payload.packing import has_numba
from tersor.registry import parse
from tersor.testing import gaussian
from tests.ops.devices import GPU

SHAPE = (72, 256)
CODECS = ["lm3", "lm2", "lm1", "rtn4g16", "rtn2", "rtn2s", "rtn8", "fit4", "rot,lm3", "rot,rtn4g64", "rotout,lm2",
          "rotboth@7,lm4", "rot,rot@3,lm2", "rot,tr2x8o", "rot,tr3x9", "tr2.5x8", "tr2.5x8o", "rot,tr1.5nx8o", "tr2nx8",
          "sum(rot,lm2;lm1)", "rot,sum(lm2;lm2)", "rows50(lm3;lm2)", "rot,rows50(lm3;lm2)", "sym8", "lr8(fp16;fp16)",
          "std,lm3"]
LAUNCHED = ["lm1", "lm2", "lm3", "lm4", "rtn8", "rtn4g128", "fit4", "rot,lm2", "rot,lm3", "rot,lm4", "rotboth@7,lm4",
            "rot,tr2x8o", "rot,tr3x9o", "rot,tr4x8o", "rot,tr2x8", "tr3x9", "sum(rot,lm2;lm1)", "rows50(lm3;lm2)"]
HALVES = [torch.bfloat16, torch.float16]


def layer(codec: str, shape: tuple[int, int] = SHAPE, seed: int = 0) -> tuple[CompressedLinear, Encoded]:
    encoded = parse(codec).encode(gaussian(shape, seed))
    made = CompressedLinear(encoded.codec, shape, bias=False, device="cpu")
    made.load_state_dict({f"weight/{key}": tensor for key, tensor in encoded.tensors.items()})
    return made, encoded


def ready(made: CompressedLinear) -> bool:
    """Tell whether a product is held ready."""
    kept = made._payload.ready._made
    return kept is not None and vars(kept).get("few") is not None


@pytest.mark.parametrize("codec", CODECS)
def test_has_the_bits_of_matmul(codec: str) -> None:
    made, encoded = layer(codec)
    for dtype in (torch.float32, torch.float64, *HALVES):
        for count in (1, 3, 4, 5, 16, 17):
            x = gaussian((count, SHAPE[1]), count).to(dtype)
            y = made(x)
            assert y.dtype == dtype
            assert torch.equal(y, encoded.matmul(x)), (dtype, count)


@pytest.mark.skipif(not has_numba(), reason="products are made ready for compiled kernels")
@pytest.mark.parametrize("codec", [one for one in CODECS if one not in ("sym8", "lr8(fp16;fp16)", "std,lm3")])
def test_is_ready_after_a_call(codec: str) -> None:
    made, _ = layer(codec)
    made(gaussian((1, SHAPE[1]), 1))
    assert ready(made)


@pytest.mark.parametrize("shape", [(1, 256), (3, 16), (33, 8), (70, 520), (17, 40), (130, 24)], ids=str)
@pytest.mark.parametrize("codec", ["lm2", "lm3", "rot,lm4", "rtn4g8", "rot,tr2x8o", "tr2nx8o"])
def test_takes_any_shape(codec: str, shape: tuple[int, int]) -> None:
    made, encoded = layer(codec, shape)
    for size in ((shape[1],), (2, 1, shape[1]), (0, shape[1]), (1, 3, 0, shape[1])):
        x = gaussian(size, 1)
        assert torch.equal(made(x), encoded.matmul(x))
        assert made(x).shape == (*size[:-1], shape[0])


def test_takes_vectors_of_any_strides() -> None:
    made, encoded = layer("rot,lm3")
    wide = gaussian((4, 2 * SHAPE[1]), 1)
    for x in (wide[:, ::2], wide[:, 1::2], wide[::2, : SHAPE[1]], gaussian((SHAPE[1], 4), 1).T,
              torch.view_as_complex(gaussian((4, SHAPE[1], 2), 1)).conj().imag):
        assert torch.equal(made(x), encoded.matmul(x.clone()))


def test_huge_numbers_overflow_in_silence() -> None:
    x = torch.full((1, SHAPE[1]), 3e38)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for codec in ("lm2", "rtn2", "rot,tr2x8o", "tr2nx8", "rtn4g16"):
            made, encoded = layer(codec)
            assert torch.equal(made(x).nan_to_num(), encoded.matmul(x).nan_to_num())


def in_inference(made: CompressedLinear, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return made(x)


def without_gradients(made: CompressedLinear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return made(x)


def in_autocast(made: CompressedLinear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return made(x)


def of_references(made: CompressedLinear, x: Tensor) -> Tensor:
    with reference_only():
        return made(x)


@pytest.mark.parametrize("codec", ["rot,lm3", "rot,tr2x8o", "tr2nx8"])
@pytest.mark.parametrize("around", [in_inference, without_gradients, in_autocast, of_references])
def test_what_is_around_a_call(around: Callable[..., Tensor], codec: str) -> None:
    made, encoded = layer(codec)
    for dtype in (torch.float32, torch.bfloat16):
        x = gaussian((2, SHAPE[1]), 1).to(dtype)
        made(x)
        other: Any = encoded  # `matmul` of an encoded matrix goes through torch's dispatcher
        assert torch.equal(around(made, x), around(other.matmul, x))


@pytest.mark.parametrize("codec", ["rot,lm3", "rot,tr2x8o", "rows50(lm3;lm2)"])
def test_copies_hold_their_own(codec: str) -> None:
    made, encoded = layer(codec)
    x = gaussian((1, SHAPE[1]), 1)
    made(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not ready(other)
        assert torch.equal(other(x), encoded.matmul(x))
        for tensor in other.buffers():
            if tensor.is_floating_point():
                tensor.mul_(2)
        assert not torch.equal(other(x), made(x))
        assert torch.equal(made(x), encoded.matmul(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("codec", ["rot,lm3", "rot,tr2x8o", "tr2nx8", "rtn4g16"])
def test_a_payload_loaded_later_is_noticed(codec: str, assign: bool) -> None:
    made, encoded = layer(codec)
    x = gaussian((1, SHAPE[1]), 1)
    made(x)
    other = parse(codec).encode(gaussian(SHAPE, 7))
    made.load_state_dict({f"weight/{key}": tensor for key, tensor in other.tensors.items()}, assign=assign)
    want = other.matmul(x)
    assert torch.equal(made(x), want)
    for name, tensor in encoded.tensors.items():
        made.get_buffer(f"weight/{name}").data = tensor
    assert torch.equal(made(x), encoded.matmul(x))
    assert not torch.equal(made(x), want)


def test_conversions_are_noticed_and_let_go() -> None:
    made, _ = layer("rot,lm3")
    x = gaussian((1, SHAPE[1]), 1)
    made(x)
    made.half()
    assert made._payload.ready._made is None
    assert torch.equal(made(x), made._payload.encoded().matmul(x))
    assert made.get_buffer("weight/inner/scales").dtype == torch.float16
    made.to("meta")
    assert made(x.to("meta")).shape == (1, SHAPE[0])


def test_of_tensors_of_inference_mode_nothing_is_kept() -> None:
    with torch.inference_mode():
        made, _ = layer("lm3")
        made = copy.deepcopy(made)
        x = gaussian((1, SHAPE[1]), 1)
        first = made(x)
        made.get_buffer("weight/scales").mul_(2)
        assert torch.equal(made(x), 2 * first)
        assert made._payload.ready._made is None


@pytest.mark.parametrize("codec", ["rot,lm3", "lm2"])
def test_gradients_tangents_and_batches_are_not_lost(codec: str) -> None:
    made, encoded = layer(codec)
    x = gaussian((2, SHAPE[1]), 1)
    made(x)
    asked = x.clone().requires_grad_()
    made(asked).sum().backward()
    assert asked.grad is not None
    torch.testing.assert_close(asked.grad[0], encoded.decode().sum(0), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.vmap(made)(x), torch.stack([made(one) for one in x]))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_watches_operations_sees_them() -> None:
    made, _ = layer("rot,lm3")
    x = gaussian((1, SHAPE[1]), 1)
    made(x)
    with _Seen() as seen:
        made(x)
    assert "tersor.codebook_linear.default" in seen.names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(made, (x,), check_trace=False)
    other = gaussian((1, SHAPE[1]), 2)
    assert torch.equal(traced(other), made(other))


def test_wrong_vectors_are_refused_as_before() -> None:
    made, _ = layer("rot,lm3")
    made(gaussian((1, SHAPE[1]), 1))
    for x in (gaussian((1, SHAPE[1] + 1), 1), torch.ones(1, SHAPE[1], dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="matmul needs floats x of shape"):
            made(x)


def on_gpu(codec: str, shape: tuple[int, int] = (512, 1024)) -> tuple[CompressedLinear, Encoded]:
    made, _ = layer(codec, shape)
    made.to("cuda")
    return made, made._payload.encoded()


@GPU
@pytest.mark.parametrize("codec", LAUNCHED)
def test_launches_have_the_bits_of_matmul(codec: str) -> None:
    made, encoded = on_gpu(codec)
    for dtype in (torch.float32, *HALVES):
        for count in (1, 2, 8, 9):
            for seed in range(3):  # the second and third call repeat what the first has written down
                x = gaussian((count, 1024), seed).to("cuda", dtype)
                y = made(x[:, None])
                assert (y.dtype, y.shape) == (dtype, (count, 1, 512))
                assert torch.equal(y[:, 0], encoded.matmul(x)), (dtype, count, seed)
    assert made._payload.ready._made is not None
    assert made._payload.ready._made.few is not None


@GPU
def test_launches_of_any_stream_and_of_graphs() -> None:
    for codec in ("rot,lm3", "rot,tr2x8o", "tr3x9"):
        made, encoded = on_gpu(codec)
        x = gaussian((1, 1024), 1).to("cuda", torch.bfloat16)
        want = encoded.matmul(x)
        made(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = made(x)
        side.synchronize()
        assert torch.equal(found, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        other = gaussian((1, 1024), 2).to("cuda", torch.bfloat16)
        x.copy_(other)
        graph.replay()
        assert torch.equal(y, encoded.matmul(other))


@GPU
@pytest.mark.parametrize("codec", ["rot,lm3", "rot,tr2x8o"])
def test_a_payload_written_to_is_noticed_on_a_gpu(codec: str) -> None:
    made, _ = on_gpu(codec)
    x = gaussian((1, 1024), 1).to("cuda", torch.bfloat16)
    first = made(x)
    made(x)
    for name, tensor in made.named_buffers():
        if name.endswith("scales"):
            tensor.mul_(2)
    assert torch.equal(made(x), 2 * first)
    made.to("cpu").to("cuda")
    assert torch.equal(made(x), 2 * first)
    odd = torch.empty(1025, device="cuda", dtype=torch.bfloat16)[1:].copy_(x[0])  # not aligned as kernels want it
    torch.testing.assert_close(made(odd[None]), 2 * first, rtol=0, atol=0)
