"""Every value lies within half a stored step of its code's value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import Uniform
from tersor.contract.codec import Encoded
from tersor.payload.packing import unpack
from tersor.quality import measure
from tersor.testing import gaussian, outliers, student_t3

EPS = torch.finfo(torch.float32).eps


def spread(codec: Uniform, encoded: Encoded, params: Tensor) -> Tensor:
    """Slow: the group's parameter of each element, by loops."""
    out = torch.empty(encoded.shape, dtype=torch.float64)
    for i in range(encoded.shape[0]):
        for j in range(encoded.shape[1]):
            place, length = (j, encoded.shape[1]) if codec.axis == "in" else (i, encoded.shape[0])
            group = place // min(codec.group_size or length, length)
            out[i, j] = float(params[i, group] if codec.axis == "in" else params[group, j])
    return out


def zeros_of(codec: Uniform, encoded: Encoded) -> Tensor:
    scales = encoded.tensors["scales"]
    if codec.symmetric:
        return torch.full(scales.shape, (codec.levels - 1) / 2)
    return unpack(encoded.tensors["zeros"], codec.levels, 0, scales.numel()).reshape(scales.shape)


CODECS = [Uniform(levels, size, symmetric, axis)
          for levels, size, symmetric, axis in [(16, 8, False, "in"), (16, 8, True, "in"), (2, None, False, "in"),
                                                (2, 5, True, "out"), (5, 7, False, "out"), (3, None, True, "in"),
                                                (256, 16, False, "in"), (8, 64, False, "out")]]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("make", ["gaussian", "student", "positive", "negative", "sparse", "tiny", "huge"])
def test_half_a_step(codec: Uniform, make: str) -> None:
    base = gaussian((11, 21))
    matrix = {"gaussian": base, "student": student_t3((11, 21)), "positive": base.abs() + 2,
              "negative": -base.abs() - 2, "sparse": base * (base > 1), "tiny": base * 1e-30, "huge": base * 1e30}[make]
    encoded = codec.encode(matrix)
    step = spread(codec, encoded, encoded.tensors["scales"])
    error = (encoded.decode().double() - matrix.double()).abs()
    assert bool((error <= step * (0.5 + 4 * codec.levels * EPS)).all())


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_decoder_is_its_formula(codec: Uniform) -> None:
    encoded = codec.encode(gaussian((11, 21)))
    codes = unpack(encoded.tensors["codes"], codec.levels, 0, 231).reshape(11, 21).double()
    expected = (spread(codec, encoded, encoded.tensors["scales"])
                * (codes - spread(codec, encoded, zeros_of(codec, encoded)))).to(torch.float32)
    assert torch.equal(encoded.decode(), expected)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_step_is_the_range_rounded_up_to_bf16(codec: Uniform) -> None:
    """No clipping: the grid covers the group, and the step is less than one bf16 above the least that does."""
    matrix = gaussian((11, 21))
    encoded = codec.encode(matrix)
    lines, size = (matrix, codec.group_size or 21) if codec.axis == "in" else (matrix.T, codec.group_size or 11)
    for i, line in enumerate(lines):
        for g in range(0, -(-line.numel() // min(size, line.numel()))):
            group = line[g * size : (g + 1) * size].double()
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            if codec.symmetric:
                low, high = -max(high, -low), max(high, -low)
            needed = (high - low) / (codec.levels - 1)
            stored = float(encoded.tensors["scales"][(i, g) if codec.axis == "in" else (g, i)])
            assert needed * (1 - 4 * EPS) <= stored <= needed * (1 + 2**-7)


def test_nearest_by_brute_force() -> None:
    codec, matrix = Uniform(8, 16), gaussian((9, 40))
    encoded = codec.encode(matrix)
    step, zero = spread(codec, encoded, encoded.tensors["scales"]), spread(codec, encoded, zeros_of(codec, encoded))
    grid = step.unsqueeze(-1) * (torch.arange(8) - zero.unsqueeze(-1))
    best = (matrix.double().unsqueeze(-1) - grid).abs().amin(-1)
    error = (encoded.decode().double() - matrix.double()).abs()
    assert bool((error <= best + 4 * 8 * EPS * step).all())


@settings(max_examples=60, deadline=None)
@given(levels=st.integers(2, 40), size=st.sampled_from([None, 3, 16]), symmetric=st.booleans(),
       axis=st.sampled_from(["in", "out"]), kind=st.sampled_from([gaussian, student_t3, outliers]),
       seed=st.integers(0, 99))
def test_mse_clipping_is_never_worse(levels: int, size: int | None, symmetric: bool, axis: str, kind: object,
                                     seed: int) -> None:
    codec, matrix = Uniform(levels, size, symmetric, axis), kind((12, 50), seed)  # type: ignore[operator]
    plain = measure(matrix, codec.encode(matrix)).relative_error
    clipped = measure(matrix, codec.encode(matrix, options={"clip": "mse"})).relative_error
    assert clipped <= plain * (1 + 64 * EPS)


def test_mse_clipping_pays_on_heavy_tails() -> None:
    matrix = student_t3((64, 256))
    errors = [measure(matrix, Uniform(4, 64).encode(matrix, options={"clip": clip})).relative_error
              for clip in ("absmax", "mse")]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("levels", [2, 5, 16, 255])
def test_grids_are_exact_on_themselves(levels: int) -> None:
    """A matrix that lies on a grid with a bf16 step comes back bit by bit."""
    codes = torch.randint(levels, (6, 32), generator=torch.Generator().manual_seed(1))
    codes[:, 0], codes[:, 1] = 0, levels - 1
    symmetric = (codes - (levels - 1) / 2) * 0.25
    assert torch.equal(Uniform(levels, None, True).encode(symmetric).decode(), symmetric)
    asymmetric = (codes - levels // 3) * 0.25
    assert torch.equal(Uniform(levels, None, False).encode(asymmetric).decode(), asymmetric)
