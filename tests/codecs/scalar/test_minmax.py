"""The released quantizer against loops in float64, and the dithered one against its theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tersor
from tersor.codecs import MinMax
from tersor.contract.codec import Search
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.payload.packing import unpack
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian, student_t3

EPS = torch.finfo(torch.float32).eps


def reference(matrix: Tensor, levels: int) -> Tensor:
    """Slow: the nearest of all levels, one element at a time, float64."""
    low, high = float(matrix.min()), float(matrix.max())
    grid = [low + code * (high - low) / (levels - 1) for code in range(levels)]
    nearest = [min(grid, key=lambda level: abs(level - value)) for value in matrix.double().reshape(-1).tolist()]
    return torch.tensor(nearest, dtype=torch.float64).reshape(matrix.shape)


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 256, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_equals_loops(levels: int, scale: float) -> None:
    matrix = student_t3((7, 11)) * scale + scale
    found = MinMax(levels).encode(matrix).decode().double()
    expected = reference(matrix, levels)
    assert float((found - expected).abs().max()) <= EPS * float(expected.abs().max())  # levels are rounded to float32


@pytest.mark.parametrize("levels", [2, 7, 256, 65536])
def test_half_a_step_and_both_ends(levels: int) -> None:
    matrix = student_t3((40, 33)) - 5
    encoded = MinMax(levels).encode(matrix)
    step = float(matrix.max() - matrix.min()) / (levels - 1)
    error = (encoded.decode().double() - matrix.double()).abs()
    assert float(error.max()) <= step / 2 + EPS * float(matrix.abs().max())
    assert float(encoded.decode().min()) == float(matrix.min())
    assert float(encoded.decode().max()) == float(matrix.max())
    assert encoded.nbytes == encoded.codec.nbytes((40, 33)) == math.ceil(40 * 33 * encoded.codec.layout(
        (40, 33))["codes"].nbytes / (40 * 33)) + 8


def test_one_bit_is_the_least_and_the_largest() -> None:
    matrix = gaussian((20, 30))
    decoded = MinMax(2).encode(matrix).decode()
    assert set(decoded.unique().tolist()) == {float(matrix.min()), float(matrix.max())}
    assert torch.equal(decoded == matrix.max(), matrix.double() > (float(matrix.min()) + float(matrix.max())) / 2)


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
@pytest.mark.parametrize("value", [0.0, 3.25, -0.1, 1e-40, -3.3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_matrices_are_exact(value: float, dtype: torch.dtype, rounding: str) -> None:
    matrix = torch.full((3, 5), value, dtype=dtype)
    for levels in (2, 5, 256):
        decoded = MinMax(levels).encode(matrix, options={"rounding": rounding}).decode()
        assert torch.equal(decoded, matrix.float())


def test_the_whole_range_of_float32() -> None:
    for matrix in (torch.tensor([[-3.4e38, 3.4e38, 0.0, 1.7e38]]), torch.tensor([[-1e-45, 1e-45, 0.0, 5e-44]])):
        decoded = MinMax(65536).encode(matrix).decode()
        step = float(matrix.max().double() - matrix.min().double()) / 65535
        assert float((decoded.double() - matrix.double()).abs().max()) <= step / 2 + EPS * float(matrix.abs().max())


def test_float64_input() -> None:
    """The range is rounded to fp32; what lies beyond by a rounding goes to the end."""
    matrix = gaussian((9, 40)).double() / 3
    decoded = MinMax(4).encode(matrix).decode().double()
    assert float((decoded - reference(matrix, 4)).abs().max()) <= 2 * EPS * float(matrix.abs().max())


def dithered(matrix: Tensor, levels: int, draws: int) -> Tensor:
    """Return many decoded copies, float64 (draws, out, in)."""
    return torch.stack([MinMax(levels).encode(matrix, seed=seed, options={"rounding": "dithered"}).decode().double()
                        for seed in range(draws)])


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_dither_is_unbiased_with_the_variance_of_theory(levels: int) -> None:
    """E Q(x) = x and Var <= step²/4: means of n draws within 5 standard errors, for each of 60 elements."""
    matrix, draws = student_t3((6, 10)), 400
    found = dithered(matrix, levels, draws)
    step = 2 * float(matrix.abs().max()) / (levels - 1)
    place = (matrix.double() + matrix.abs().max().double()) / step
    share = place - place.floor()
    variance = share * (1 - share) * step**2  # of a Bernoulli number times a step
    assert float(variance.max()) <= step**2 / 4
    error = (found.mean(0) - matrix.double()).abs()
    assert bool((error <= 5 * (variance / draws).sqrt() + 4 * EPS * float(matrix.abs().max())).all())
    assert bool(((found - matrix.double()).abs() <= step * (1 + 8 * levels * EPS)).all())  # a neighbour always
    # the variance of a sample's variance is at most that of a squared step: step⁴ / (16 n) a number
    mean_variance = float((found - matrix.double()).square().mean())
    assert abs(mean_variance - float(variance.mean())) <= 5 * step**2 / 4 / (draws * matrix.numel()) ** 0.5


def test_dither_depends_on_the_seed_alone() -> None:
    matrix = gaussian((30, 40))
    before = torch.random.get_rng_state()
    first, again, other = (MinMax(4).encode(matrix, seed=seed, options={"rounding": "dithered"}) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.tensors["codes"], again.tensors["codes"])
    assert not torch.equal(first.tensors["codes"], other.tensors["codes"])


def test_dither_does_not_clip_float64() -> None:
    peak = 1.0 + 2.0**-30  # rounds down in float32
    encoded = MinMax(2).encode(torch.tensor([[peak, -0.5]], dtype=torch.float64), options={"rounding": "dithered"})
    assert float(encoded.tensors["range"][1]) >= peak


def test_column_blocks() -> None:
    matrix, x = gaussian((32, 24)) @ gaussian((24, 24), 2), gaussian((300, 24), 4) @ gaussian((24, 24), 5)
    codec, hessian = MinMax(16), x.T @ x
    encoder = codec.columns(matrix, Search())
    parts = [encoder.block(start, matrix[:, start : start + 3]) for start in range(0, 24, 3)]
    plain = codec.encode(matrix)
    assert torch.equal(torch.cat(parts, 1), plain.decode())
    assert torch.equal(encoder.finish().tensors["codes"], plain.tensors["codes"])
    fed = encode_with_feedback(codec.columns(matrix, Search()), matrix, hessian).check()
    assert measure(matrix, fed, hessian).distortion < 0.8 * measure(matrix, plain, hessian).distortion


def test_strings_fields_and_options() -> None:
    assert parse("mm8") == MinMax(256) == MinMax()
    assert parse("mmL5") == MinMax(5)
    for levels in (0, 1, 65537, 2.5, True, "8"):
        with pytest.raises(CodecConfigError, match="minmax: levels"):
            MinMax(levels)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="levels"):
        parse("mm0")  # 0 bits: the released code divides by zero
    with pytest.raises(CodecConfigError, match="rounding"):
        MinMax(4).encode(gaussian((2, 3)), options={"rounding": "up"})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError):
            MinMax(4).encode(torch.tensor([[1.0, bad]]))
    with pytest.raises(CodecConfigError, match="non-empty"):
        MinMax(4).encode(torch.zeros(0, 4))


def test_sixteen_bits_stay_float32() -> None:
    """The released code returns float64 there."""
    encoded = tersor.compress(gaussian((8, 8)), codec="mm16")
    assert encoded.decode().dtype == torch.float32
    assert encoded.nbytes == 128 + 8
    assert unpack(encoded.tensors["codes"], 65536, 0, 64).max() == 65535
