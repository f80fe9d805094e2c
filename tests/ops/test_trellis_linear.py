"""Products with trellis codes: filters are each other's transposes, decoded rows are the filter of their signs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.ops.dispatch import reference_only
from tersor.ops.trellis_linear import decoded_rows, segments, trellis_filter, trellis_linear
from tersor.ops.trellis_linear.reference import matrix
from tersor.ops.trellis_linear.shapes import Line, refusal
from tersor.payload import packing
from tersor.testing import gaussian
from tests.ops.devices import DEVICES

LINES = [Line(256, (2, 2), 12), Line(600, (2, 3), 12), Line(771, (3,), 9), Line(130, (2, 2, 1, 2), 12),
         Line(700, (4, 4), 40), Line(64, (1, 2), 8), Line(64, (4,), 8), Line(128, (4,), 8), Line(128, (3,), 9),
         Line(576, (4,), 12), Line(256, (4, 5), 12)]  # a few steps see a sign: of these Triton takes several at once
LAST = 2.0**-23


def taps_of(line: Line) -> Tensor:
    return gaussian((len(line.shifts), line.memory), line.memory).to(torch.float32)


def whole(line: Line) -> Tensor:
    """The oracle: the matrix of all segments, float64 (length, stream)."""
    return torch.block_diag(*(matrix(taps_of(line), line, size) for size in segments(line.length)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("back", [False, True])
def test_filters_are_the_matrix_of_taps(line: Line, device: str, *, back: bool) -> None:
    oracle = whole(line).T if back else whole(line)
    x = gaussian((2, 3, oracle.shape[1]), 1).to(torch.float32)
    scales = None if back else gaussian((line.length,), 2).to(torch.bfloat16).to(device)
    found = trellis_filter(x.to(device), taps_of(line).to(device), scales, line.shifts, line.length, back=back).cpu()
    want, size = x.double() @ oracle.T, x.double().abs() @ oracle.abs().T
    if scales is not None:
        want, size = want * scales.cpu().double(), size * scales.cpu().double().abs()
    terms = int((oracle != 0).sum(1).max())
    assert found.dtype == torch.float32
    assert bool(((found - want).abs() <= (terms + 2) * LAST * size).all())


def held(line: Line, width: int, *, across: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and scales of a matrix of random bits, and the matrix, float64."""
    rows = line.length if across else 24
    shape = (line.stream, width) if across else (rows, line.stream)
    bits = torch.randint(2, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    scales = (gaussian((rows,), 4).abs() + 0.1).to(torch.bfloat16)
    signs = bits.double() * 2 - 1
    dense = whole(line) @ signs if across else signs @ whole(line).T
    return packing.pack(bits, 2), scales, dense * scales.double()[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("across", [False, True])
def test_rows_are_the_filter_of_their_signs(line: Line, device: str, *, across: bool) -> None:
    width = 40 if across else line.length
    codes, scales, dense = held(line, width, across=across)
    codes, scales, taps = codes.to(device), scales.to(device), taps_of(line).to(device)
    bound = (line.memory + 2) * LAST * float(taps.abs().sum(1).max()) * float(scales.max())
    for rows in (slice(0, len(dense)), slice(3, 17), torch.tensor([5, 0, 5, 20])):
        found = decoded_rows(codes, taps, scales, line, width, rows, across=across).cpu()
        torch.testing.assert_close(found.double(), dense[rows], rtol=0, atol=bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize(("across", "width"), [(False, 0), (True, 40), (True, 96)])
def test_many_vectors_meet_decoded_rows(device: str, dtype: torch.dtype, line: Line, width: int, *,
                                        across: bool) -> None:
    width = width if across else line.length
    codes, scales, dense = held(line, width, across=across)
    x = gaussian((5, 20, width), 5).to(dtype)
    found = trellis_linear(x.to(device), codes.to(device), taps_of(line).to(device), scales.to(device), line.shifts,
                           across=across).cpu()
    assert found.shape == (5, 20, len(dense))
    assert found.dtype == dtype
    # numbers of 16 bits are summed in float16, rounded at each tap to the last place of what all taps may sum to; then
    # they are rounded to the dtype of the vectors (float32 to tf32 in the product), and the result is
    last = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    reach = float(taps_of(line).abs().sum(1).max())
    summed = line.memory * 2.0**-11 * reach * scales.double() if dtype != torch.float32 else 0 * scales.double()
    size = x.double().abs() @ dense.abs().T
    bound = 2 * last * size + x.double().abs().sum(-1, keepdim=True) * summed
    assert bool(((found - x.double() @ dense.T).abs() <= bound).all())


def test_what_the_kernels_take() -> None:
    assert refusal(Line(256, (2, 2), 12)) is None
    assert "shorter than a window" in str(refusal(Line(16, (2, 2), 40)))
    assert "period" in str(refusal(Line(256, (2, 2, 3), 12)))


@pytest.mark.parametrize("length", [3, 7])
def test_circles_shorter_than_the_window(length: int) -> None:
    line = Line(length, (2, 2), 40)
    signs = (gaussian((2, line.stream), 6) > 0).to(torch.float32) * 2 - 1
    with reference_only():
        found = trellis_filter(signs, taps_of(line), None, line.shifts, length)
    torch.testing.assert_close(found.double(), signs.double() @ whole(line).T, rtol=0, atol=1e-5)
