"""A rotation is an isometry: errors pass through it unchanged, and the inverse gives the matrix back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.codecs import Dense, MixedRows, Rotated, Scalar, Uniform
from tersor.contract.codec import Codec
from tersor.numerics.rotation import Rotation
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian, outliers, student_t3, tolerance, with_spectrum

SIDES = ["in", "out", "both"]
SHAPES = [(16, 64), (24, 97), (36, 40), (10, 1009), (1, 1)]


def terms(shape: tuple[int, int]) -> int:
    return 4 * sum(shape)


def rotated(matrix: Tensor, side: str, seed: int) -> Tensor:
    """The definition, with dense float64 matrices: R_out W R_in'."""
    out = matrix.double()
    if side != "out":
        dense = Rotation(matrix.shape[1], 2 * seed).forward(torch.eye(matrix.shape[1])).double()
        out = out @ dense
    if side != "in":
        dense = Rotation(matrix.shape[0], 2 * seed + 1).forward(torch.eye(matrix.shape[0])).double()
        out = dense.T @ out
    return out


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_inner_gives_the_matrix_back(side: str, shape: tuple[int, int]) -> None:
    matrix = student_t3(shape)
    encoded = Rotated(Dense("fp32"), side, 5).encode(matrix)
    bound = tolerance(torch.float32, terms(shape)) * float(matrix.norm())
    assert float((encoded.decode() - matrix).norm()) <= 2 * bound
    assert float((encoded.tensors["inner/values"].double() - rotated(matrix, side, 5)).norm()) <= bound


@pytest.mark.parametrize("inner", [Scalar(4), Uniform(8, 16), MixedRows(Scalar(8), Scalar(2), 5)], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_errors_are_those_of_the_rotated_frame(inner: Codec, side: str, shape: tuple[int, int]) -> None:
    matrix = outliers(shape)
    codec = Rotated(inner, side, 2)
    encoded = codec.encode(matrix)
    outside = float((encoded.decode().double() - matrix.double()).norm())
    frame = encoded.child("inner", inner, shape).decode().double()
    inside = float((frame - rotated(matrix, side, 2)).norm())
    assert abs(outside - inside) <= 2 * tolerance(torch.float32, terms(shape)) * float(matrix.norm())
    # and the payload is what the inner codec makes of the rotated matrix, to the rounding of the rotation
    alone = inner.encode(rotated(matrix, side, 2).float()).decode().double()
    assert float((alone - frame).norm()) <= 0.05 * float(frame.norm())


@pytest.mark.parametrize("text", ["rot,lm2", "rotboth,lm2"])
def test_rotation_makes_any_matrix_gaussian(text: str) -> None:
    """Outliers, heavy tails, a decaying spectrum: at most the 4-level table's error on noise, .1175."""
    spectrum = torch.logspace(0, -2, 128)
    for matrix in (outliers((128, 512)), student_t3((128, 512)), with_spectrum((128, 512), spectrum)):
        error = measure(matrix, parse(text).encode(matrix)).relative_error
        assert error <= 1.03 * 0.1175
    plain = measure(outliers((128, 512)), Scalar(4).encode(outliers((128, 512)))).relative_error
    assert plain > 0.3


@pytest.mark.parametrize("side", SIDES)
def test_hessian_is_conjugated(side: str) -> None:
    """Distortion under H equals the rotated frame's distortion under R H R'."""
    matrix, x = gaussian((20, 48)), with_spectrum((96, 48), torch.logspace(0, -1, 48), 3)
    hessian = x.T @ x
    encoded = Rotated(Scalar(4), side).encode(matrix)
    error = (encoded.decode() - matrix).double()
    outside = float(((error @ hessian.double()) * error).sum())
    frame = encoded.child("inner", Scalar(4), (20, 48)).decode().double() - rotated(matrix, side, 0)
    metric = hessian if side == "out" else Rotation(48, 0).conjugate(hessian)
    inside = float(((frame @ metric.double()) * frame).sum())
    assert inside == pytest.approx(outside, rel=1e3 * tolerance(torch.float32, 48))


@pytest.mark.parametrize("side", SIDES)
def test_matmul_never_rebuilds_the_matrix(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = gaussian((24, 96)), gaussian((3, 96), 1)
    codec = Rotated(Scalar(8), side)
    encoded = codec.encode(matrix)
    expected = x.double() @ encoded.decode().double().T
    monkeypatch.setattr(Rotated, "decode", None)
    monkeypatch.setattr(Rotated, "decode_rows", None)
    bound = tolerance(torch.float32, terms((24, 96))) * float(x.norm()) * float(matrix.norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound


def test_seeds_and_sides_are_fields() -> None:
    matrix = gaussian((16, 64))
    decoded = [Rotated(Scalar(4), side, seed).encode(matrix).decode() for side in SIDES for seed in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(decoded) for b in decoded[:i])
    # input and output sides never share a stream of signs, whatever their seeds
    assert not torch.equal(Rotated(Dense("fp32"), "in").encode(matrix).decode(),
                           Rotated(Dense("fp32"), "in").encode(matrix).tensors["inner/values"])


def test_decoding_with_another_seed_is_wrong() -> None:
    matrix = gaussian((16, 64))
    encoded = Rotated(Scalar(16)).encode(matrix)
    other = Rotated(Scalar(16), seed=1)
    wrong = type(encoded)(other, encoded.shape, encoded.tensors).decode()
    assert float((wrong - matrix).norm() / matrix.norm()) > 1
