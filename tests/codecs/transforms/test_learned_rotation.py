"""OPQ: the stored rotation is orthogonal, never worse than where it started, and decoding multiplies by just it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersor.codecs import Dense, LearnedRotation, Product, Scalar
from tersor.codecs.transforms.learned_rotation import MAX_WIDTH
from tersor.errors import CodecConfigError
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, student_t3, tolerance, with_spectrum


def correlated(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows whose columns, far apart, move together: what consecutive groups alone cannot use."""
    half = gaussian((shape[0], shape[1] // 2), seed)
    return torch.cat([half, half + 0.1 * gaussian(half.shape, seed + 1)], 1)


def orthogonality(rotation: Tensor) -> float:
    wide = rotation.double()
    return float((wide @ wide.T - torch.eye(wide.shape[0], dtype=torch.float64)).norm() / wide.shape[0] ** 0.5)


@pytest.mark.parametrize("start", ["identity", "random", "pca"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_rotation_is_orthogonal(start: str, precision: str) -> None:
    encoded = LearnedRotation(Product(2, 8), precision).encode(correlated((64, 16)), options={"rotation_init": start})
    # fp16 rounds each entry by at most 2**-11 of itself: rows of norm 1 are off by as much, and products by twice
    bound = tolerance(torch.float32, 64) if precision == "fp32" else 2 * 2**-11
    assert orthogonality(encoded.tensors["rotation"]) <= bound


@pytest.mark.parametrize("text", ["pq2x8f32", "pq4x9m", "lm2"])
@pytest.mark.parametrize("make", [correlated, gaussian, student_t3])
def test_never_worse_than_the_start(text: str, make: object) -> None:
    """From the identity the objective is at most that of the inner codec alone; with fp32 entries exactly so."""
    matrix = make((128, 16))  # type: ignore[operator]
    plain = measure(matrix, parse(text).encode(matrix)).relative_error
    errors = [measure(matrix, LearnedRotation(parse(text), "fp32").encode(matrix, options={"rounds": rounds}))
              .relative_error for rounds in (0, 1, 4, 10)]
    assert errors[0] == pytest.approx(plain, rel=tolerance(torch.float32, 16))
    slack = 1 + tolerance(torch.float32, 16 * 128)  # rotating back and forth rounds
    assert all(after <= before * slack for before, after in itertools.pairwise(errors))


def test_correlated_columns_gain() -> None:
    matrix = correlated((512, 16))
    plain, learned = (measure(matrix, parse(text).encode(matrix)).relative_error for text in ("pq4x16", "opq,pq4x16"))
    assert learned < 0.85 * plain
    spectrum = with_spectrum((256, 16), torch.logspace(0, -2, 16))
    assert (measure(spectrum, parse("opq,pq4x16").encode(spectrum)).relative_error
            < 0.9 * measure(spectrum, parse("pq4x16").encode(spectrum)).relative_error)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_inner_codec_sees_the_stored_rotation(precision: str) -> None:
    matrix, inner = correlated((40, 12)), Product(2, 6)
    encoded = LearnedRotation(inner, precision).encode(matrix)
    rotation = encoded.tensors["rotation"].float()
    alone = inner.encode(matrix @ rotation.T)
    assert all(torch.equal(tensor, encoded.tensors[f"inner/{name}"]) for name, tensor in alone.tensors.items())
    decoded = alone.decode().double() @ rotation.double()
    assert float((encoded.decode() - decoded).norm()) <= tolerance(torch.float32, 12) * float(matrix.norm())


def test_fp16_costs_less_than_a_millionth() -> None:
    for width in (8, 64, 128):
        matrix = student_t3((32, width))
        codec = LearnedRotation(Dense("fp32"))
        encoded = codec.encode(matrix, options={"rotation_init": "random", "rounds": 0})
        assert measure(matrix, encoded).relative_error < 1e-6


def test_slow_reference_of_one_round() -> None:
    """One round by the definition: R = U Vᵀ of the decoded matrix against the matrix (orthogonal Procrustes)."""
    matrix, inner = correlated((60, 8)), Scalar(3)
    decoded = inner.encode(matrix).decode().double()
    u, _, v = torch.linalg.svd(decoded.T @ matrix.double())
    encoded = LearnedRotation(inner, "fp32").encode(matrix, options={"rounds": 1})
    error = float((matrix.double() - decoded @ (u @ v)).square().sum())
    noise = torch.linalg.qr(torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    assert all(error <= float((matrix.double() - decoded @ q).square().sum()) for q in noise)
    assert float((encoded.tensors["rotation"].double() - u @ v).norm()) <= 1e-4


def test_trained_rotations_are_shared() -> None:
    codec = parse("opqt,pq2x8t")
    samples = [correlated((50, 12), seed) * 2.0**seed for seed in range(3)]
    tables = codec.train(samples)
    assert set(tables) == {"rotation", "inner/codebooks", "inner/scale"}
    encoded = [codec.encode(sample, tables=tables) for sample in samples]
    assert all(torch.equal(e.tensors["rotation"], tables["rotation"]) for e in encoded)
    layout = codec.layout((50, 12))
    assert [name for name, spec in layout.items() if not spec.shared] == ["inner/codes"]
    assert not LearnedRotation(Product(2, 8)).layout((50, 12))["rotation"].shared
    with pytest.raises(CodecConfigError, match="train"):
        codec.encode(samples[0])
    with pytest.raises(CodecConfigError, match="one width"):
        codec.train([samples[0], gaussian((50, 8))])
    with pytest.raises(CodecConfigError, match="one width"):
        codec.train([])
    with pytest.raises(CodecConfigError, match="width of 12"):
        codec.encode(gaussian((50, 16)), tables=tables)
    own = parse("opq,pq2x8t")  # a rotation of each matrix's own that suits the shared codebooks
    shared = own.train(samples)
    assert (measure(samples[0], own.encode(samples[0], tables=shared)).relative_error
            <= measure(samples[0], parse("pq2x8t").encode(samples[0], tables={
                name.removeprefix("inner/"): t for name, t in shared.items()})).relative_error * 1.001)


def test_the_hessian_is_conjugated() -> None:
    matrix = gaussian((64, 16))
    x = gaussian((300, 4), 3) @ gaussian((4, 16), 4) + 0.1 * gaussian((300, 16), 5)
    hessian = x.T @ x
    plain, fed = (measure(matrix, parse("opq,lm2").encode(matrix, hessian=hessian, options=options), hessian).distortion
                  for options in ({}, {"feedback": True}))
    assert fed < 0.8 * plain


def test_matmul_rotates_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = gaussian((24, 40)), gaussian((5, 40), 1)
    encoded = parse("opq,pq4x8").encode(matrix)
    expected = x.double() @ encoded.decode().double().T
    monkeypatch.setattr(LearnedRotation, "decode", None)
    monkeypatch.setattr(LearnedRotation, "decode_rows", None)
    bound = tolerance(torch.float32, 64) * float(x.norm()) * float(matrix.norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound


def test_strings_and_bad_fields() -> None:
    assert parse("opqf32t,pq4x8") == LearnedRotation(Product(4, 8), "fp32", True)
    assert LearnedRotation(Scalar(4), trained=True).spec() == "opqt,lm2"
    for arguments in (("lm3",), (Scalar(4), "bf16"), (Scalar(4), "fp16", 1)):
        with pytest.raises(CodecConfigError, match="learned_rotation: "):
            LearnedRotation(*arguments)  # type: ignore[arg-type]
    for options in ({"rounds": -1}, {"rounds": 1.5}, {"rotation_init": "eye"}):
        with pytest.raises(CodecConfigError, match=next(iter(options))):
            parse("opq,lm2").encode(gaussian((8, 8)), options=options)


def test_wide_and_degenerate_matrices() -> None:
    with pytest.raises(CodecConfigError, match=f"at most {MAX_WIDTH}"):
        parse("opq,lm2").encode(torch.zeros(1, MAX_WIDTH + 1))
    for matrix in (torch.zeros(6, 8), torch.full((6, 8), 2.5)):
        assert measure(matrix, encode(parse("opq,pq2x4"), matrix)).relative_error < 1e-6
    with pytest.raises(CodecConfigError, match="non-empty"):
        parse("opq,lm2").encode(torch.zeros(0, 8))
