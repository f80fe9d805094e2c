"""Standardized columns against a float64 reference; what a mean and a scale a column buy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.codecs import Dense, Product, Scalar, Standardized
from tersor.contract.codec import Search
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, outliers, student_t3, tolerance

EPS = torch.finfo(torch.float32).eps


def reference(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stored mean, stored scale and standardized matrix of a float64 matrix, by the definition."""
    wide = matrix.double()
    mean = wide.mean(0).to(torch.bfloat16)
    scale = (wide - mean.double()).square().mean(0).sqrt().to(torch.bfloat16)
    return mean, scale, (wide - mean.double()) / scale.double()


@pytest.mark.parametrize("make", [gaussian, student_t3, outliers])
@pytest.mark.parametrize("offset", [0.0, 7.3])
def test_equals_a_float64_reference(make: object, offset: float) -> None:
    matrix = make((60, 24), 3) * torch.logspace(-3, 3, 24) + offset  # type: ignore[operator]
    encoded = Standardized(Dense("fp32")).encode(matrix)
    mean, scale, rest = reference(matrix)
    assert torch.equal(encoded.tensors["mean"], mean)
    assert torch.equal(encoded.tensors["scale"], scale)
    assert float((encoded.tensors["inner/values"].double() - rest).abs().max()) <= EPS * float(rest.abs().max())
    back = encoded.decode().double() - matrix.double()
    assert float((back.abs() / matrix.abs().amax(0).double()).max()) <= 4 * EPS


@pytest.mark.parametrize("inner", [Scalar(8), Product(2, 6), Scalar(5, "shared")], ids=str)
def test_the_error_is_the_inner_codecs_by_columns(inner: object) -> None:
    matrix = student_t3((50, 16)) * torch.logspace(-2, 2, 16) - 3
    encoded = encode(Standardized(inner), matrix)  # type: ignore[arg-type]
    _, scale, rest = reference(matrix)
    inside = encoded.child("inner", encoded.codec.children()["inner"], (50, 16)).decode().double()
    outside = encoded.decode().double() - matrix.double()
    assert torch.allclose(outside, (inside - rest) * scale.double(), rtol=0,
                          atol=8 * EPS * float(matrix.abs().max()))


def test_columns_of_unlike_offset_and_scale() -> None:
    matrix = outliers((256, 64)) * torch.logspace(-1, 1, 64) + torch.linspace(-20, 20, 64)
    plain, standard = (measure(matrix - matrix.mean(0), parse(text).encode(matrix - matrix.mean(0))).relative_error
                       for text in ("lm3", "std,lm3"))
    assert standard < 0.5 * plain
    assert measure(matrix, parse("std,lm3").encode(matrix)).relative_error < 0.1 * measure(
        matrix, parse("lm3").encode(matrix)).relative_error


@pytest.mark.parametrize("value", [0.0, 3.25, -1e30, 1e-36, 0.1])
def test_columns_of_equal_numbers(value: float) -> None:
    """Exact up to bf16; what bf16 leaves over goes to the inner codec."""
    matrix = torch.full((9, 8), value)
    decoded = Standardized(Scalar(2)).encode(matrix).decode()
    step = torch.finfo(torch.bfloat16)
    assert float((decoded - matrix).abs().max()) <= step.eps * abs(value) + step.smallest_normal * step.eps
    if value in (0.0, 3.25):
        encoded = Standardized(Scalar(2)).encode(matrix)
        assert torch.equal(decoded, matrix)
        assert not bool(encoded.tensors["scale"].any())


@pytest.mark.parametrize("inner", ["lm3", "sym16m", "two2x2m", "rtn4g64"])
@pytest.mark.parametrize("value", [0.0, 3.25])
def test_a_column_of_equal_numbers_is_exact_and_leaves_the_others_alone(inner: str, value: float) -> None:
    """Such a column once took the scale 1, by which inner codecs' noise on its zeros was multiplied."""
    matrix = 1e-4 * gaussian((64, 24))
    matrix[:, 5] = value
    codec, hessian = parse(f"std,{inner}"), torch.eye(24)
    for encoded in (encode(codec, matrix), codec.encode(matrix, hessian=hessian, options={"feedback": True})):
        others = torch.arange(24) != 5
        decoded = encoded.decode()
        assert bool((decoded[:, 5] == value).all())
        assert float((decoded - matrix)[:, others].norm() / matrix[:, others].norm()) < 0.4
    assert codec.encode(torch.zeros(64, 24), hessian=hessian).decode().count_nonzero() == 0


def test_the_hessian_is_carried_along() -> None:
    """Distortion under H equals the standardized one under S H S, so feedback inside sees the right metric."""
    matrix = gaussian((64, 24)) * torch.logspace(-1, 1, 24)
    x = gaussian((300, 6), 3) @ gaussian((6, 24), 4) + 0.1 * gaussian((300, 24), 5)
    hessian = x.T @ x
    plain, fed = (measure(matrix, parse("std,lm2").encode(matrix, hessian=hessian, options=options), hessian).distortion
                  for options in ({}, {"feedback": True}))
    assert fed < 0.8 * plain
    tiny = parse("std,lm2").encode(matrix * 2.0**100, hessian=hessian, options={"feedback": True})
    assert measure(matrix * 2.0**100, tiny, hessian).distortion == pytest.approx(fed, rel=1e-3)


def test_column_blocks() -> None:
    matrix, x = gaussian((32, 24)) + 5, gaussian((300, 24), 4)
    codec = parse("std,pq4x6")
    encoder = codec.columns(matrix, Search())
    assert encoder.width == 4
    driven = encode_with_feedback(encoder, matrix, x.T @ x)
    assert driven.codec == codec
    assert driven.check().decode().shape == (32, 24)
    again = codec.columns(matrix, Search())
    parts = [again.block(start, matrix[:, start : start + 4]) for start in range(0, 24, 4)]
    assert torch.equal(torch.cat(parts, 1), again.finish().decode())
    with pytest.raises(CodecConfigError, match="column blocks"):
        parse("std,rot,lm2").columns(matrix, Search())


def test_matmul_adds_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = gaussian((24, 40)) + 3, gaussian((5, 40), 1)
    encoded = parse("std,lm4").encode(matrix)
    expected = x.double() @ encoded.decode().double().T
    monkeypatch.setattr(Standardized, "decode", None)
    monkeypatch.setattr(Standardized, "decode_rows", None)
    bound = tolerance(torch.float32, 64) * float(x.norm()) * float(matrix.norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound


def test_bad_fields_and_empty_matrices() -> None:
    with pytest.raises(CodecConfigError, match="standardized: inner"):
        Standardized("lm3")  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="non-empty"):
        parse("std,lm3").encode(torch.zeros(3, 0))
    with pytest.raises(CodecConfigError, match="admits at most 0"):
        parse("std,swap1,lm3").encode(gaussian((4, 7)))
