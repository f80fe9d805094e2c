"""Products with matrices of codewords against float64; on CUDA the kernels, elsewhere plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.ops import reference_only
from tersor.ops.product_linear import Codewords, _op, product_linear, reference
from tersor.ops.product_linear.shapes import division_of, radix, refusal
from tersor.payload import packing
from tersor.payload.layout import radix_word
from tersor.registry import parse
from tersor.testing import gaussian, tolerance
from tests.ops.devices import CUDA, DEVICES, on_devices

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# rows, width, words, dim, books (0: one a group), bits of a codebook's integers (16.0: float16, 32.0: float32), layers
CASES = [
    (1, 1, 2, 1, 1, 16.0, 0), (1, 16, 2, 16, 1, 32.0, 0), (3, 5, 3, 1, 0, 16.0, 0), (70, 64, 16, 4, 0, 16.0, 0),
    (300, 256, 256, 4, 0, 16.0, 0), (70, 96, 12, 4, 0, 32.0, 0), (130, 64, 50, 2, 1, 10, 0), (40, 64, 300, 1, 1, 2, 0),
    (1100, 64, 1000, 4, 1, 16.0, 0), (8, 64, 40_000, 4, 1, 16.0, 0), (8, 64, 65_536, 4, 1, 32.0, 0),
    (33, 96, 6, 4, 0, 16, 0), (515, 2048, 48, 8, 0, 5, 0), (20, 64, 5, 4, 0, 16.0, 1), (20, 64, 5, 4, 0, 10, 2),
    (37, 128, 74, 4, 0, 10, 3), (8, 64, 512, 4, 1, 9, 1), (8, 64, 2048, 4, 1, 3, 1), (300, 1024, 184, 4, 0, 10, 3),
    (64, 96, 4, 3, 0, 16.0, 0), (24, 96, 8, 4, 0, 16.0, 4), (24, 24, 8, 4, 0, 16.0, 1)]
pytestmark = pytest.mark.usefixtures("poison")


def payload_of(case: tuple[int, int, int, int, int, float, int], device: str = "cpu", seed: int = 0) -> Codewords:
    """Return a random matrix of codewords."""
    rows, width, words, dim, shared, kind, layers = case
    generator = torch.Generator().manual_seed(seed)
    groups = width // dim
    books = shared or groups
    codes = packing.pack(torch.randint(words, (rows, groups), generator=generator), words)
    scale = offset = mask = None
    levels = 0
    if isinstance(kind, float):
        table = torch.randn(books, words, dim, generator=generator).to(torch.float16 if kind == 16.0 else torch.float32)
        scale = torch.tensor([2.0**-7], device=device) if kind == 16.0 else None
    else:
        levels = 2**kind
        table = packing.pack(torch.randint(levels, (books, words, dim), generator=generator), levels)
        scale, offset = torch.tensor([3.0 / levels], device=device), torch.tensor([-1.4], device=device)
    if layers:
        mask = packing.pack(torch.randint(2, (rows, layers, width // 2), generator=generator), 2).to(device)
    return Codewords(codes.to(device), table.to(device), scale, offset, mask, rows, words, dim, books, levels, layers)


def defined(payload: Codewords, width: int) -> Tensor:
    """Return W in float64, number by number from its definition."""
    groups = width // payload.dim
    codes = packing.unpack(payload.codes.cpu(), payload.words, 0, payload.rows * groups).long().reshape(-1, groups)
    raw, count = payload.codebooks.cpu(), payload.books * payload.words * payload.dim
    raw = packing.unpack(raw, payload.levels, 0, count) if payload.levels else raw
    table = raw.double().reshape(payload.books, payload.words, payload.dim)
    table = table * (1.0 if payload.scale is None else payload.scale.cpu().double())
    table = table + (0.0 if payload.offset is None else payload.offset.cpu().double())
    book = torch.arange(groups) if payload.books > 1 else torch.zeros(groups, dtype=torch.long)
    rows = table[book, codes].reshape(payload.rows, width)
    if payload.mask is None:
        return rows
    masks = packing.unpack(payload.mask.cpu(), 2, 0, payload.rows * payload.layers * width // 2)
    return reference.unswap(rows, masks.reshape(payload.rows, payload.layers, width // 2) == 1)


def error(found: Tensor, x: Tensor, matrix: Tensor) -> float:
    """Return the error over what sums in float32, weights of 16 bits where vectors are, and rounding allow."""
    bound = float(x.double().norm() * matrix.norm()) * (tolerance(torch.float32, sum(matrix.shape))
                                                        + (2**-8 if found.dtype == torch.bfloat16 else 0.0))
    expected = x.cpu().double() @ matrix.T
    bound += tolerance(found.dtype, 1) * float(expected.norm())
    return float((found.cpu().double() - expected).norm()) / bound


@on_devices(("case", "dtype"),
            cpu=[*((case, torch.float32) for case in CASES), *((CASES[4], dtype) for dtype in DTYPES[1:])],
            cuda=[(case, dtype) for case in CASES for dtype in DTYPES])
def test_it_is_the_product(device: str, case: tuple[int, int, int, int, int, float, int], dtype: torch.dtype) -> None:
    payload = payload_of(case, device)
    matrix = defined(payload, case[1])
    for batch in (1, 2, 3, 8, 9, 40):
        x = gaussian((batch, case[1]), batch).to(device, dtype)
        found = product_linear(x, payload)
        assert found.dtype == dtype
        assert found.shape == (batch, case[0])
        assert error(found, x, matrix) <= 1
    assert product_linear(x[:0], payload).shape == (0, case[0])
    flat = product_linear(x[:6], payload)
    assert torch.equal(product_linear(x[:6].reshape(2, 3, -1), payload), flat.reshape(2, 3, -1))
    across = x.T.contiguous().T[::2]
    assert error(product_linear(across, payload), across, matrix) <= 1
    assert error(product_linear(x[0], payload), x[0], matrix) <= 1


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("case", [(4096, 4096, 256, 4, 0, 16.0, 0), (4096, 4096, 184, 4, 0, 10, 3),
                                  (1024, 14336, 16, 2, 0, 16.0, 1), (5000, 1408, 101, 4, 0, 32.0, 3)], ids=str)
def test_large(device: str, case: tuple[int, int, int, int, int, float, int]) -> None:
    payload = payload_of(case, device)
    matrix = defined(payload, case[1])
    for batch in (1, 5, 64):
        for dtype in (torch.float32, torch.bfloat16):
            x = gaussian((batch, case[1]), batch).to(device, dtype)
            assert error(product_linear(x, payload), x, matrix) <= 1


@pytest.mark.parametrize("words", [3, 5, 6, 7, 11, 48, 74, 100, 300, 1000, 5000, 40_000, 65_535])
@pytest.mark.parametrize("device", DEVICES)
def test_codes_of_any_number_of_levels(device: str, words: int) -> None:
    """Also the largest codes in a row, whose words are the largest that there are; the table names the code."""
    codes = torch.randint(words, (64, 32), generator=torch.Generator().manual_seed(words))
    codes[:20], codes[20:30] = words - 1, 0
    table = torch.arange(words, dtype=torch.float32, device=device).reshape(1, words, 1)
    payload = Codewords(packing.pack(codes, words).to(device), table, None, None, None, 64, words, 1, 1)
    found = product_linear(torch.eye(32, device=device), payload)
    assert torch.equal(found.T.long().cpu(), codes)


def test_matrices_that_take_plain_torch() -> None:
    def why(case: tuple[int, int, int, int, int, float, int], dtype: torch.dtype = torch.float32) -> str:
        return str(refusal(payload_of(case), case[1], dtype))

    assert why((8, 64, 4, 4, 0, 16.0, 3)) == "None"
    assert "float64" in why((8, 64, 4, 4, 0, 16.0, 0), torch.float64)
    assert "power of two" in why((8, 96, 4, 3, 0, 16.0, 0))
    assert "layers" in why((8, 64, 4, 4, 0, 16.0, 4))
    assert "blocks of 12" in why((8, 24, 4, 4, 0, 16.0, 1))


@pytest.mark.parametrize("look_up", [False, True])
@pytest.mark.parametrize(("rows", "groups", "layers"), [(1, 1, 0), (37, 32, 3), (4096, 1024, 0), (128_256, 1024, 1)])
def test_divisions_cover_everything(rows: int, groups: int, layers: int, look_up: bool) -> None:
    cut = division_of(rows, groups, layers, look_up=look_up, dim=4, processors=132)
    assert cut.splits * cut.groups >= groups >> layers > (cut.splits - 1) * cut.groups
    assert cut.programs * cut.chunk * cut.rows >= rows
    assert radix(256) == (8, 1, 1)
    assert radix(300) == (0, *reversed(radix_word(300)))


@pytest.mark.parametrize("device", DEVICES)
def test_op(device: str) -> None:
    for case in ((20, 64, 5, 4, 0, 10, 2), (70, 64, 16, 4, 0, 16.0, 0)):
        p, x = payload_of(case, device), gaussian((3, 64), 1).to(device)
        for given in (x, x.clone().requires_grad_()):
            torch.library.opcheck(_op, (given, p.codes, p.codebooks, p.scale, p.offset, p.mask, p.sizes))
        x.requires_grad_()
        y = gaussian((3, case[0]), 2).to(device)
        (gradient,) = torch.autograd.grad((product_linear(x, p) * y).sum(), x)
        assert error(gradient, y, defined(p, 64).T) <= 1


@pytest.mark.parametrize("text", ["pq4x16", "pq4x12b10m", "swap3,pq4x11b10", "sum(swap2,pq4x6b10;pq4x2b10)",
                                  "rot,pq4x8"])
@pytest.mark.parametrize("device", DEVICES)
def test_codecs_compiled_whole(device: str, text: str) -> None:
    encoded = parse(text).encode(gaussian((96, 64)).to(device))
    compiled = torch.compile(encoded.matmul, backend="eager", fullgraph=True)
    x = gaussian((4, 64), 1).to(device)
    torch.testing.assert_close(compiled(x), encoded.matmul(x))
    expected = x.double() @ encoded.decode().double().T
    bound = tolerance(torch.float32, 160) * float(x.norm() * encoded.decode().norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound


@pytest.mark.parametrize("case", [(515, 2048, 48, 8, 0, 5, 0), (300, 1024, 184, 4, 0, 10, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 4, 20])
@pytest.mark.parametrize("device", [CUDA])
def test_captured_in_a_graph(device: str, batch: int, case: tuple[int, int, int, int, int, float, int]) -> None:
    payload, x = payload_of(case, device), gaussian((batch, case[1]), 0).to(device, torch.bfloat16)
    product_linear(x, payload)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product_linear(x, payload)
    x.copy_(gaussian((batch, case[1]), 1))
    graph.replay()
    assert error(y, x, defined(payload, case[1])) <= 1
    assert torch.equal(y, product_linear(x, payload))


@pytest.mark.parametrize("device", [CUDA])
def test_reference_only(device: str) -> None:
    payload, x = payload_of(CASES[12], device), gaussian((2, 2048), 0).to(device)
    with reference_only():
        plain = product_linear(x, payload)
    ours = product_linear(x, payload)
    assert not torch.equal(plain, ours)  # else this test has not met the kernel
    matrix = defined(payload, 2048)
    assert error(plain, x, matrix) <= 1
    assert error(ours, x, matrix) <= 1
