"""Products with two thin factors against float64; on CUDA the kernels, elsewhere plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.ops import reference_only
from tersor.ops.low_rank_linear import low_rank_linear
from tersor.ops.low_rank_linear.shapes import SUMS, division_of, refusal
from tersor.registry import parse
from tersor.testing import gaussian, tolerance
from tests.ops.devices import CUDA, DEVICES, on_devices

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (50, 70, 5), (300, 257, 64), (33, 500, 200), (7, 9, 3), (1000, 64, 33), (64, 3000, 130)]
pytestmark = pytest.mark.usefixtures("poison")


def factors(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return L (out, rank) and R (in, rank)."""
    out, width, rank = shape
    return gaussian((out, rank), 1).to(device, dtype), gaussian((width, rank), 2).to(device, dtype)


def error(found: Tensor, x: Tensor, left: Tensor, right: Tensor) -> float:
    """Return the error over what two sums in float32, a middle of the vectors' dtype, and rounding allow."""
    x, left, right = (t.cpu().double() for t in (x, left, right))
    middle = x @ right
    expected = middle @ left.T
    terms = tolerance(torch.float32, right.shape[0] + right.shape[1]) * x.norm() * right.norm() * left.norm()
    bound = float(terms + torch.finfo(found.dtype).eps * (middle.norm() * left.norm()))
    bound += tolerance(found.dtype, 1) * float(expected.norm())
    return float((found.cpu().double() - expected).norm()) / bound


@on_devices(("dtype", "stored"), cpu=list(zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True)),
            cuda=[(dtype, stored) for dtype in DTYPES for stored in DTYPES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product(device: str, shape: tuple[int, int, int], dtype: torch.dtype, stored: torch.dtype) -> None:
    left, right = factors(shape, stored, device)
    for batch in (1, 2, 3, 8, 9, 40):
        x = gaussian((batch, shape[1]), batch).to(device, dtype)
        found = low_rank_linear(x, left, right)
        assert found.dtype == dtype
        assert found.shape == (batch, shape[0])
        assert error(found, x, left, right) <= 1
    assert low_rank_linear(x[:0], left, right).shape == (0, shape[0])
    assert low_rank_linear(x[:6].reshape(2, 3, -1), left, right).shape == (2, 3, shape[0])
    across = x.T.contiguous().T[::2]
    assert error(low_rank_linear(across, left, right), across, left, right) <= 1
    other = left.T.contiguous().T, right.T.contiguous().T
    assert error(low_rank_linear(x[:2], *other), x[:2], left, right) <= 1


@pytest.mark.parametrize("shape", [(4096, 4096, 64), (14336, 4096, 256), (4096, 14336, 512)], ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_large(device: str, shape: tuple[int, int, int]) -> None:
    left, right = factors(shape, torch.bfloat16, device)
    for batch in (1, 5, 64):
        for dtype in (torch.float32, torch.bfloat16):
            x = gaussian((batch, shape[1]), batch).to(device, dtype)
            assert error(low_rank_linear(x, left, right), x, left, right) <= 1


@pytest.mark.parametrize("shape", [*SHAPES, (14336, 4096, 1024), (128_256, 8192, 16)], ids=str)
def test_divisions_cover_everything(shape: tuple[int, int, int]) -> None:
    out, width, rank = shape
    cut = division_of(out, width, rank, 132)
    assert cut.splits * cut.steps * cut.inputs >= width > (cut.splits - 1) * cut.steps * cut.inputs
    assert cut.splits * rank <= max(SUMS, rank)
    assert "float64" in str(refusal(torch.float32, torch.float64))
    assert refusal(*DTYPES) is None


@pytest.mark.parametrize("device", DEVICES)
def test_op(device: str) -> None:
    left, right = factors((20, 30, 4), torch.bfloat16, device)
    x = gaussian((3, 30)).to(device)
    for given in (x, x.clone().requires_grad_()):
        torch.library.opcheck(low_rank_linear, (given, left, right))
    x.requires_grad_()
    y = gaussian((3, 20), 2).to(device)
    (gradient,) = torch.autograd.grad((low_rank_linear(x, left, right) * y).sum(), x)
    assert error(gradient, y, right, left) <= 1


@pytest.mark.parametrize("text", ["lr16(bf16;fp16)", "lr3(fp32)"])
@pytest.mark.parametrize("device", DEVICES)
def test_codecs_compiled_whole(device: str, text: str) -> None:
    encoded = parse(text).encode(gaussian((96, 64)).to(device))
    compiled = torch.compile(encoded.matmul, backend="eager", fullgraph=True)
    x = gaussian((4, 64), 1).to(device)
    torch.testing.assert_close(compiled(x), encoded.matmul(x))


@pytest.mark.parametrize("batch", [1, 4, 20])
@pytest.mark.parametrize("device", [CUDA])
def test_captured_in_a_graph(device: str, batch: int) -> None:
    left, right = factors((300, 512, 64), torch.bfloat16, device)
    x = gaussian((batch, 512), 0).to(device, torch.bfloat16)
    low_rank_linear(x, left, right)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = low_rank_linear(x, left, right)
    x.copy_(gaussian((batch, 512), 1))
    graph.replay()
    assert error(y, x, left, right) <= 1
    assert torch.equal(y, low_rank_linear(x, left, right))


@pytest.mark.parametrize("device", [CUDA])
def test_reference_only(device: str) -> None:
    left, right = factors((300, 512, 64), torch.bfloat16, device)
    x = gaussian((3, 512), 0).to(device)
    with reference_only():
        plain = low_rank_linear(x, left, right)
    ours = low_rank_linear(x, left, right)
    assert not torch.equal(plain, ours)  # else this test has not met the kernels
    assert error(plain, x, left, right) <= 1
    assert error(ours, x, left, right) <= 1
