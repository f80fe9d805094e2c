"""Exact for values that the dtype can hold, correctly rounded for others."""

from __future__ import annotations

import pytest
import torch

from tersor.codecs import Dense
from tersor.codecs.scalar.dense import DTYPES
from tersor.errors import NonFiniteError
from tersor.testing import gaussian


@pytest.mark.parametrize("name", list(DTYPES))
def test_representable_values_are_exact(name: str) -> None:
    matrix = gaussian((7, 11)).to(DTYPES[name])
    encoded = Dense(name).encode(matrix)
    assert torch.equal(encoded.decode(), matrix.float())
    assert encoded.rate == 8 * DTYPES[name].itemsize
    assert encoded.tensors["values"].data_ptr() != matrix.data_ptr()  # a copy: later changes to the input stay out


@pytest.mark.parametrize("name", list(DTYPES))
def test_others_are_rounded_to_nearest(name: str) -> None:
    matrix = gaussian((50, 60)).double() * 3
    error = (Dense(name).encode(matrix).decode().double() - matrix).abs()
    assert bool((error <= matrix.abs() * torch.finfo(DTYPES[name]).eps / 2).all())


def test_overflow_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="overflow fp16; use bf16"):
        Dense("fp16").encode(torch.tensor([[1e5]]))
    assert float(Dense("bf16").encode(torch.tensor([[1e5]])).decode()) == pytest.approx(1e5, rel=2**-8)
    with pytest.raises(NonFiniteError):
        Dense("bf16").encode(torch.tensor([[3.4e38]]))


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_memory_layouts(layout: str) -> None:
    base = gaussian((12, 12))
    matrix = base.T if layout == "transposed" else base[::3, ::2]
    encoded = Dense("fp32").encode(matrix)
    assert encoded.tensors["values"].is_contiguous()
    assert torch.equal(encoded.decode(), matrix)


def test_numbers_too_small_for_fp16_are_refused() -> None:
    """They once came out as zeros; a few among larger ones are of no account."""
    matrix = gaussian((8, 16))
    for factor in (2.0**-20, 2.0**-30, 2.0**-100):
        with pytest.raises(NonFiniteError, match="lose their digits in fp16"):
            Dense("fp16").encode(matrix * factor)
    matrix[3] *= 2.0**-30
    assert float((Dense("fp16").encode(matrix).decode() - matrix).norm()) <= 2.0**-11 * float(matrix.norm())
    assert not bool(Dense("fp16").encode(torch.zeros(3, 4)).decode().any())
