"""Gauge-fixed low rank: exact on matrices of its rank, with bounded coefficients; the count of its numbers; damage."""

import math

import pytest
import torch
from torch import Tensor

from tersor.codecs import Dense, Interpolative, LowRank
from tersor.codecs.low_rank.interpolative import truncate
from tersor.codecs.low_rank.pivots import LARGEST, interpolate
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.registry import parse
from tersor.testing import encode, gaussian, tolerance, with_spectrum

FP32 = Dense("fp32")


def of_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> Tensor:
    return with_spectrum(shape, [2.0**-i for i in range(rank)], seed)


def reference(encoded: Encoded) -> Tensor:
    """The definition, slowly: chosen rows (columns) copied, each other one a sum of them."""
    codec = encoded.codec
    assert isinstance(codec, Interpolative)
    bits = [int(byte) >> place & 1 for byte in encoded.tensors["chosen"] for place in range(8)]
    count = encoded.shape[0 if codec.axis == "rows" else 1]
    chosen = [i for i in range(count) if bits[i]]
    others = [i for i in range(count) if not bits[i]]
    left, right = encoded.tensors["left/values"].double(), encoded.tensors["right/values"].double()
    out = torch.zeros(encoded.shape, dtype=torch.float64)
    for position, i in enumerate(chosen):
        if codec.axis == "rows":
            out[i] = right[position]
        else:
            out[:, i] = left[:, position]
    for position, i in enumerate(others):
        for j in range(codec.rank):
            if codec.axis == "rows":
                out[i] += left[position, j] * right[j]
            else:
                out[:, i] += right[j, position] * left[:, j]
    return out


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(("shape", "rank"), [((20, 30), 5), ((30, 20), 5), ((12, 12), 11), ((9, 14), 9), ((14, 9), 9),
                                             ((40, 33), 1)])
def test_exact_on_matrices_of_its_rank(axis: str, shape: tuple[int, int], rank: int) -> None:
    """The theorem: W of rank r is its pivot rows and what the others are of them; only rounding remains."""
    matrix = of_rank(shape, rank)
    encoded = encode(Interpolative(rank, FP32, FP32, axis), matrix)
    # Z is bounded, so rounding of its rank products is magnified by at most 1 + rank LARGEST
    bound = (1 + rank * LARGEST) * tolerance(torch.float32, rank) * float(matrix.norm())
    assert float((encoded.decode() - matrix).norm()) <= bound
    x = gaussian((4, shape[1]), 1)
    assert float((encoded.matmul(x) - x @ matrix.T).norm()) <= bound * float(x.norm())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_reference(axis: str) -> None:
    encoded = encode(Interpolative(6, FP32, FP32, axis), gaussian((17, 23)))
    expected = reference(encoded)
    assert float((encoded.decode() - expected).norm()) <= tolerance(torch.float32, 6) * float(expected.norm())


@pytest.mark.parametrize(("rows", "rank"), [(40, 8), (200, 64), (64, 63), (5, 5), (30, 1)])
@pytest.mark.parametrize("kind", ["random", "graded", "singular", "repeated", "zero"])
def test_interpolation_is_exact_and_bounded(rows: int, rank: int, kind: str) -> None:
    basis = gaussian((rows, rank), rows).double()
    if kind == "graded":
        basis = basis * torch.logspace(0, -12, rank, dtype=torch.float64)
    if kind == "singular":
        basis[:, rank // 2 :] = basis[:, : rank - rank // 2] * 2.0
    if kind == "repeated":
        basis[rows // 2 :] = basis[: rows - rows // 2].clone()
    if kind == "zero":
        basis = torch.zeros_like(basis)
    pivots, coefficients = interpolate(basis)
    others = torch.ones(rows, dtype=torch.bool)
    others[pivots] = False
    assert pivots.tolist() == sorted(set(pivots.tolist()))
    assert coefficients.shape == (rows - rank, rank)
    bound = rows * rank * LARGEST * torch.finfo(torch.float64).eps
    gap = coefficients @ basis[pivots] - basis[others]
    assert bool((gap.norm(dim=0) <= 4.0 * bound * basis.norm(dim=0)).all())
    if coefficients.numel():
        assert float(coefficients.abs().max()) <= LARGEST


def test_truncation_is_the_best_under_a_hessian() -> None:
    matrix, mixing = gaussian((14, 20)).double(), gaussian((20, 20), 2).double()
    hessian = mixing @ mixing.T
    root = torch.linalg.cholesky(hessian)
    left, right = truncate(matrix, 5, hessian)
    best = float(torch.linalg.svdvals(matrix @ root)[5:].norm())
    assert float(((matrix - left @ right.T) @ root).norm()) == pytest.approx(best, rel=1e-10)
    encoded = Interpolative(5, FP32, FP32).encode(matrix, hessian=hessian)
    assert float(((matrix - encoded.decode().double()) @ root).norm()) == pytest.approx(best, rel=1e-5)


def test_its_numbers_are_counted() -> None:
    """r (d1 + d2 - r) numbers and a bit a row; so more rank than a pair of factors at equal bytes."""
    for shape in ((96, 160), (160, 96)):
        for axis, count in (("rows", shape[0]), ("columns", shape[1])):
            codec = Interpolative(24, Dense("bf16"), Dense("bf16"), axis)
            assert codec.nbytes(shape) == 2 * 24 * (shape[0] + shape[1] - 24) + math.ceil(count / 8)
    matrix = with_spectrum((128, 128), [1 / (1 + i) for i in range(128)])
    budget = int(0.8 * 128 * 128 * 4)
    gauge = max(r for r in range(1, 128) if Interpolative(r, FP32, FP32).nbytes((128, 128)) <= budget)
    pair = max(r for r in range(1, 128) if LowRank(r, FP32, FP32).nbytes((128, 128)) <= budget)
    assert gauge > 1.35 * pair
    errors = [float((encode(codec, matrix).decode() - matrix).norm())
              for codec in (Interpolative(gauge, FP32, FP32), LowRank(pair, FP32, FP32))]
    assert errors[0] ** 2 < 0.7 * errors[1] ** 2


def test_all_rows_chosen_leaves_nothing_to_combine() -> None:
    matrix = gaussian((6, 40))
    codec = Interpolative(6, FP32, FP32)
    assert set(codec.layout((6, 40))) == {"chosen", "right/values"}
    assert torch.allclose(encode(codec, matrix).decode(), matrix, atol=1e-6)
    assert set(Interpolative(6, FP32, FP32, "columns").layout((40, 6))) == {"chosen", "left/values"}


def test_damaged_bits_still_decode() -> None:
    encoded = encode(Interpolative(4, FP32, FP32), gaussian((17, 20)))
    for value in (0x00, 0xFF):
        tensors = {**encoded.tensors, "chosen": torch.full_like(encoded.tensors["chosen"], value)}
        damaged = Encoded(encoded.codec, encoded.shape, tensors)
        assert damaged.decode().shape == (17, 20)
        assert damaged.matmul(gaussian((3, 20))).shape == (3, 17)


def test_strings_and_bad_fields() -> None:
    assert parse("id24(bf16)") == Interpolative(24, Dense("bf16"), Dense("bf16"))
    assert parse("id24c(fp16;rot,lm4)").spec() == "id24c(fp16;rot,lm4)"
    for bad in ({"rank": 0}, {"rank": True}, {"axis": "both"}, {"left": "bf16"}):
        fields = {"rank": 2, "left": FP32, "right": FP32, "axis": "rows", **bad}
        with pytest.raises(CodecConfigError, match="interpolative"):
            Interpolative(**fields)
    with pytest.raises(CodecConfigError, match="rank 9 is above 8"):
        Interpolative(9, FP32, FP32).layout((8, 20))
    with pytest.raises(CodecConfigError, match="one or two"):
        parse("id2(bf16;bf16;bf16)")
