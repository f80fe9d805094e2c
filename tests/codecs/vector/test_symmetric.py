"""The symmetric codec: against a slow reference, at its nominal error, on both axes, with feedback."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tersor.codecs import Rotated, Symmetric
from tersor.codecs.scalar.lloyd_max import gaussian_table
from tersor.codecs.vector import orbits
from tersor.errors import CodecConfigError
from tersor.payload.scales import reciprocal
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian, student_t3, tolerance


def reference(matrix: Tensor, bits: int, scale: str, axis: str) -> Tensor:
    """Encode and decode one sub-vector at a time against every word."""
    words = orbits.gaussian(bits).words
    dim = {"row": 1, "column": 0, "matrix": (0, 1)}[scale]
    scales = matrix.square().mean(dim, keepdim=True).sqrt().to(torch.bfloat16).to(torch.float32)
    normal = (matrix * reciprocal(scales)).T if axis == "out" else matrix * reciprocal(scales)
    out = torch.empty_like(normal)
    whole = normal.shape[1] // 8 * 8
    table = gaussian_table(1 << min(6, max(1, bits // 8)))
    for i, row in enumerate(normal):
        for j in range(0, whole, 8):
            out[i, j : j + 8] = words[(row[j : j + 8] - words).square().sum(1).argmin()]
        for j in range(whole, len(row)):
            out[i, j] = table[(row[j] - table).abs().argmin()]
    return (out.T if axis == "out" else out) * scales


@pytest.mark.parametrize("scale", ["row", "column", "matrix"])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("shape", [(19, 21), (16, 8), (3, 5)])
def test_against_the_reference(scale: str, axis: str, shape: tuple[int, int]) -> None:
    matrix = gaussian(shape, 3)
    decoded = Symmetric(12, scale=scale, axis=axis).encode(matrix).decode()
    slow = reference(matrix, 12, scale, axis)
    assert float((decoded - slow).norm()) <= tolerance(torch.float32, 8) * float(matrix.norm())


@pytest.mark.parametrize(("bits", "error"), [(8, 0.3162), (16, 0.08595), (24, 0.02213)])
@pytest.mark.parametrize("make", [gaussian, student_t3])
def test_rotated_error_is_the_gaussian_one(bits: int, error: float, make: object) -> None:
    matrix = make((256, 1024), 1)  # type: ignore[operator]
    found = measure(matrix, Rotated(Symmetric(bits)).encode(matrix))
    # 32,768 sub-vectors: the mean error of one has a spread of about .5 of it; heavy tails are never worse
    low = 0.97 if make is gaussian else 0.9
    assert low * error <= found.relative_error <= error * (1 + 4 * 0.5 / math.sqrt(matrix.numel() / 8))
    assert found.rate == pytest.approx(bits / 8 + 16 / 1024)


def test_two_bits_beat_the_lattice_e8() -> None:
    matrix = gaussian((512, 4096))
    found = measure(matrix, Rotated(Symmetric(16)).encode(matrix))
    assert found.rate <= 2.02
    assert found.relative_error <= 0.0911


def test_fitted_beats_gaussian_on_heavy_tails() -> None:
    matrix = student_t3((512, 256))
    errors = [measure(matrix, parse(text).encode(matrix)).relative_error for text in ("sym16m", "sym16fm")]
    assert errors[1] < errors[0]


def test_refits_lower_the_error() -> None:
    matrix = student_t3((64, 256))
    plain, refitted = (Symmetric(16).encode(matrix, options={"refits": n}) for n in (0, 3))
    assert measure(matrix, refitted).relative_error < measure(matrix, plain).relative_error


@pytest.mark.parametrize("text", ["sym16", "sym16o", "sym24c", "sum(sym16;sym12)", "sum(sym16;lm2)"])
def test_feedback_lowers_the_proxy(text: str) -> None:
    mixing = gaussian((96, 96), 7) / 96**0.5
    hessian = mixing @ mixing.T + 0.01 * torch.eye(96)
    matrix = gaussian((40, 96), 8)
    codec = parse(text)
    plain = codec.encode(matrix, hessian=hessian)
    fed = codec.encode(matrix, hessian=hessian, options={"feedback": True})
    assert measure(matrix, fed, hessian).distortion < 0.9 * measure(matrix, plain, hessian).distortion
    assert fed.check().codec == codec


def test_column_encoder_without_corrections_is_the_plain_encoder() -> None:
    matrix = gaussian((19, 45), 2)
    for text in ("sym20", "sym20c", "sym20mo", "sym12f", "sum(sym16;sym8)"):
        codec = parse(text)
        identity = codec.encode(matrix, hessian=torch.eye(45), options={"feedback": True})
        plain = codec.encode(matrix)
        assert all(torch.equal(identity.tensors[name], plain.tensors[name]) for name in plain.tensors)


@pytest.mark.parametrize("fields", [{"bits": 17}, {"bits": 34}, {"codebook": "best"}, {"scale": "none"},
                                    {"axis": "diagonal"}])
def test_bad_fields(fields: dict[str, object]) -> None:
    with pytest.raises(CodecConfigError, match=next(iter(fields))):
        Symmetric(**fields)  # type: ignore[arg-type]


def test_bad_refits() -> None:
    with pytest.raises(CodecConfigError, match="refits"):
        Symmetric().encode(gaussian((8, 8)), options={"refits": -1})
