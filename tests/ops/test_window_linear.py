"""Products by the table of windows: rows are bit for bit those of the definition, whatever makes them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tersor.codecs.trellis.angles import folded
from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.streamed import signs_of
from tersor.codecs.trellis.windows import Window
from tersor.ops import dispatch, reference_only, workers
from tersor.ops.trellis_linear import segments
from tersor.ops.window_linear import decoded_rows, image_of, reference, window_linear
from tersor.ops.window_linear.shapes import tables
from tersor.ops.window_linear.shapes.lanes import FEW, refusal
from tersor.payload import packing
from tersor.registry import parse
from tersor.testing import gaussian, tolerance
from tests.ops.devices import CUDA, DEVICES

CODES = sorted(folded())
SOME = [(1.25, 12), (2.0, 12), (2.5, 8), (3.0, 9)]
SHAPES = [(300, 48), (40, 77), (17, 16), (130, 1000), (80, 771)]  # rows, width: some no multiples of 16
LAST = 2.0**-24


def bits_of(code: Window, rows: int, width: int, *, across: bool) -> Tensor:
    shape = (code.stream(rows), width) if across else (rows, code.stream(width))
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(rows * width), dtype=torch.uint8)


def defined(code: Window, bits: Tensor, length: int) -> Tensor:
    """The oracle: numbers of streams (n, stream), from their windows' weights, segment by segment: (n, length)."""
    parts = signs_of(bits).split([code.bits(size) for size in segments(length)], 1)
    return torch.cat([code.numbers(part, size) for part, size in zip(parts, segments(length), strict=True)], 1)


def held(code: Window, rows: int, width: int, *, across: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed bits, scales, and the matrix as it is defined."""
    bits = bits_of(code, rows, width, across=across)
    scales = (gaussian((rows,), 4).abs() + 0.1).to(torch.bfloat16)
    dense = defined(code, bits.T, rows).T if across else defined(code, bits, width)
    return packing.pack(bits, 2), scales, dense * scales.float()[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", CODES, ids=str)
@pytest.mark.parametrize("across", [False, True])
def test_rows_are_those_of_the_definition(key: tuple[float, int], device: str, *, across: bool) -> None:
    code = folded()[key]
    for rows, width in SHAPES if key in SOME else SHAPES[:1]:
        codes, scales, dense = held(code, rows, width, across=across)
        line, given = code.line(rows if across else width), [one.to(device) for one in (codes, code.table(), scales)]
        assert refusal(line, across=across) is None
        for chosen in (slice(0, rows), slice(3, 16), slice(5, 5), torch.tensor([5, 0, 5, rows - 1])):
            found = decoded_rows(*given, line, width, chosen, across=across).cpu()
            assert torch.equal(found, dense[chosen])
            plain = reference.rows(*given, line, width, chosen, across=across).cpu()
            assert torch.equal(plain, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", SOME, ids=str)
@pytest.mark.parametrize("across", [False, True])
def test_products_are_those_of_the_matrix(key: tuple[float, int], dtype: torch.dtype, *, across: bool) -> None:
    code = folded()[key]
    for rows, width in SHAPES:
        codes, scales, dense = held(code, rows, width, across=across)
        x = gaussian((FEW + 2, width), 5).to(dtype)
        want, size = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
        for count in (1, 3, FEW, FEW + 2):
            found = window_linear(x[:count], codes, code.table(), scales, code.shifts, across=across)
            # each term is rounded at most as often as there are terms and scales; then to the dtype of the vectors
            bound = (width + 3) * LAST * size[:count] + (0 if dtype == torch.float32 else 2.0**-8) * want[:count].abs()
            assert found.shape == (count, rows)
            assert found.dtype == dtype
            assert bool(((found.double() - want[:count]).abs() <= bound).all())
        assert torch.equal(window_linear(x[0], codes, code.table(), scales, code.shifts, across=across),
                           window_linear(x[:1], codes, code.table(), scales, code.shifts, across=across)[0])


@pytest.mark.parametrize("across", [False, True])
def test_any_window_of_16_bits(*, across: bool) -> None:
    code = filters()[2.0, 16]
    codes, scales, dense = held(code, 48, 64, across=across)
    rows = decoded_rows(codes, code.table(), scales, code.line(48 if across else 64), 64, slice(0, 48), across=across)
    torch.testing.assert_close(rows, dense, rtol=1e-5, atol=1e-5)  # a filter's sums round in another order


@pytest.mark.parametrize("across", [False, True])
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, *, across: bool) -> None:
    monkeypatch.setattr(workers, "LEAST", 64)
    shares: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares[-1])
    code = folded()[2.5, 8]
    codes, scales, _ = held(code, 300, 80, across=across)
    x, line = gaussian((2, 80), 6).float(), code.line(300 if across else 80)
    found = []
    for count in (1, 2, 3):
        shares.append(count)
        found.append((window_linear(x, codes, code.table(), scales, code.shifts, across=across),
                      decoded_rows(codes, code.table(), scales, line, 80, slice(0, 300), across=across)))
    for products, rows in found[1:]:
        assert torch.equal(products, found[0][0])
        assert torch.equal(rows, found[0][1])


@pytest.mark.parametrize("across", [False, True])
def test_plain_torch_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, *, across: bool) -> None:
    code = folded()[2.0, 12]
    codes, scales, dense = held(code, 64, 48, across=across)
    x, given = gaussian((2, 48), 7).float(), (codes, code.table(), scales)
    bound = 51 * LAST * (x.double().abs() @ dense.double().abs().T)

    def check() -> None:
        line = code.line(64 if across else 48)
        assert torch.equal(decoded_rows(*given, line, 48, slice(0, 64), across=across), dense)
        found = window_linear(x, *given, code.shifts, across=across)
        assert bool(((found.double() - x.double() @ dense.double().T).abs() <= bound).all())

    with reference_only():
        check()
    monkeypatch.setattr(dispatch, "has_numba", lambda: False)
    check()


@pytest.mark.parametrize(("across", "shape"), [(False, (5, 3)), (False, (5, 15)), (True, (3, 20)), (True, (1, 1)),
                                               (False, (0, 16)), (True, (0, 16)), (True, (16, 0))])
def test_tiny_lines(*, across: bool, shape: tuple[int, int]) -> None:
    code = folded()[2.0, 12]
    if math.prod(shape):
        assert refusal(code.line(shape[0] if across else shape[1]), across=across)
        codes, scales, dense = held(code, *shape, across=across)
    else:
        codes, scales, dense = torch.empty(0, dtype=torch.uint8), torch.ones(shape[0]), torch.empty(shape)
    line = code.line(shape[0] if across else shape[1])
    assert torch.equal(decoded_rows(codes, code.table(), scales, line, shape[1], slice(0, shape[0]), across=across),
                       dense)
    x = gaussian((2, shape[1]), 8).float()
    torch.testing.assert_close(window_linear(x, codes, code.table(), scales, code.shifts, across=across), x @ dense.T)


def test_what_the_kernels_take() -> None:
    assert refusal(folded()[2.0, 12].line(256), across=False) is None
    assert "more than 16" in str(refusal(filters()[2.0, 40].line(256), across=True))
    assert "fewer than 16" in str(refusal(folded()[5.0, 12].line(15), across=False))


@pytest.mark.parametrize("spec", ["tr2n", "tr3nx9o", "rot,tr2n", "rot,tr1.5nx8o"])
def test_codecs_multiply_by_the_table(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "log_once", lambda op, reason: pytest.fail(f"{op}: {reason}"))
    encoded = parse(spec).encode(gaussian((48, 64), 9).float())
    x = gaussian((3, 64), 10).float()
    dense = encoded.decode()
    torch.testing.assert_close(encoded.matmul(x), x @ dense.T, rtol=1e-5, atol=1e-4)
    with reference_only():
        torch.testing.assert_close(encoded.decode(), dense, rtol=0, atol=0 if spec.startswith("tr") else 1e-5)


KINDS = [(folded, 2.0, 12), (folded, 2.0, 8), (folded, 2.5, 12), (folded, 3.0, 12), (folded, 1.0, 12),
         (folded, 4.0, 12), (folded, 1.5, 12), (folded, 2.0, 16), (folded, 5.0, 12), (folded, 2.25, 12),
         (filters, 2.0, 14), (filters, 4.0, 12), (filters, 2.0, 16)]
LARGE = [(256, 512), (768, 1152), (1024, 2944), (512, 300)]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]:g}x{kind[2]}")
@pytest.mark.parametrize(("across", "parts"), [(False, False), (True, False), (False, True), (True, True)])
def test_products_on_cuda(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, kind: tuple, *,
                          across: bool, parts: bool) -> None:
    """Of vectors of 16 bits, numbers and vectors are rounded to half precision, or to theirs; sums are of float32.

    Of filters, two parts of numbers may be rounded before they are added.
    """
    code = kind[0]()[kind[1:]]
    if parts and kind[0] is folded:
        pytest.skip("numbers of folded codes have no parts")
    monkeypatch.setattr(tables, "SUMMED_FROM", 0)
    reach = 3 * 2.0**-11 * float(code.table().abs().max()) if parts else 0.0
    for rows, width in LARGE:
        codes, scales, dense = (one.to(device) for one in held(code, rows, width, across=across))
        image, table = image_of(code.table(), code.shifts, linear=parts).to(device), code.table().to(device)
        assert (image.ndim > 1) == parts
        x = (gaussian((70, width), 5) * torch.logspace(-2, 1, 70)[:, None]).to(dtype).to(device)
        want, size = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
        tiny = 2.0**-25 * x.double().abs().amax(1, keepdim=True) * dense.double().abs().sum(1)
        last = {torch.float32: LAST, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}[dtype]
        for count in (1, 2, 8, 9, 16, 31, 64, 70):
            found = window_linear(x[:count], codes, table, scales, code.shifts, image, across=across)
            bound = (4 * last + (width + 3) * LAST) * size[:count] + tiny[:count] + last * 2 * want[:count].abs()
            bound += reach * x[:count].double().abs().sum(1, keepdim=True) * scales.double()
            assert found.shape == (count, rows)
            assert found.dtype == dtype
            assert bool(((found.double() - want[:count]).abs() <= bound).all()), (rows, width, count)
            error = (found.double() - want[:count]).norm() / want[:count].norm()
            assert error < {torch.float32: tolerance(dtype, width), torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("across", [False, True])
def test_many_vectors_meet_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, device: str, *, across: bool) -> None:
    from tersor.ops.window_linear import launch

    code = folded()[2.0, 12]
    codes, scales, dense = (one.to(device) for one in held(code, 768, 512, across=across))
    given = (codes, code.table().to(device), scales, code.shifts, image_of(code.table(), code.shifts).to(device))
    x = gaussian((80, 512), 5).to(torch.bfloat16).to(device)
    monkeypatch.setattr(launch, "DECODED_BYTES", 256 * 512 * 2)
    found = window_linear(x, *given, across=across).double()
    want = x.double() @ dense.double().T
    assert (found - want).norm() <= 4e-3 * want.norm()
