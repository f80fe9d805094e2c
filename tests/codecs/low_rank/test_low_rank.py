"""The product of two factors against loops; what is stored, what is refused, and that the product is never formed."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tersor
from tersor.codecs import Dense, LowRank, MinMax, Scalar, Uniform
from tersor.codecs.low_rank.low_rank import METHODS, rank_for
from tersor.contract.codec import Encoded
from tersor.errors import BudgetError, CodecConfigError, NonFiniteError
from tersor.families import candidates, families, options
from tersor.families.lplr import LOW_RANK_PRESETS, LowRankPreset, NaivePreset
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, outliers, tolerance, with_spectrum

FP32 = Dense("fp32")
PUBLISHED = ("lplr", "lsvd", "dsvd")
PER_COMPONENT = Scalar(16, axis="out")


def product(encoded: Encoded) -> Tensor:
    """Slow: the sum of outer products of decoded components, float64."""
    codec = encoded.codec
    assert isinstance(codec, LowRank)
    left, right = (factor.decode().double() for factor in codec.factors(encoded))
    total = torch.zeros(encoded.shape, dtype=torch.float64)
    for k in range(codec.rank):
        total += torch.outer(left[:, k], right[:, k])
    return total


@pytest.mark.parametrize("text", ["lr3(lm4o;lm4o)", "lr5(mm8;mm4)", "lr4(rot,lm3;rtn4g8)", "lr2(fp32;pq2x4)"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_decodes_to_the_sum_of_outer_products(text: str, method: str) -> None:
    matrix, codec = outliers((33, 20)), parse(text)
    encoded = encode(codec, matrix, method=method)
    expected = product(encoded)
    bound = tolerance(torch.float32, 53) * float(matrix.norm())
    for found in (encoded.decode(), encoded.gather(torch.arange(33)), encoded.decode_rows(0, 33)):
        assert float((found - expected).norm()) <= bound
    x = gaussian((4, 20), 2)
    assert float((encoded.matmul(x) - x.double() @ expected.T).norm()) <= bound * float(x.norm())


def test_layout_is_that_of_the_factors() -> None:
    codec = LowRank(3, PER_COMPONENT, Uniform(8, 4))
    layout = codec.layout((40, 20))
    assert {name.partition("/")[0] for name in layout} == {"left", "right"}
    assert layout["left/codes"].shape == (40, 3)
    assert layout["right/codes"].shape == (20, 3)
    assert layout["left/scales"].shape == (1, 3)  # one a component
    assert codec.nbytes((40, 20)) == PER_COMPONENT.nbytes((40, 3)) + Uniform(8, 4).nbytes((20, 3))
    encoded = codec.encode(gaussian((40, 20)), options={"method": "lplr"}).check()
    assert encoded.nbytes == codec.nbytes((40, 20))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_enormous_matrices_are_never_rebuilt(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`matmul` on 40,000 x 30,000, which dense takes 4.8 GB: an array of 2**24 numbers is refused on the way."""
    small = LowRank(2, FP32, FP32).encode(gaussian((40, 30)), options={"method": method})
    left, right = (small.codec.factors(small)[i].decode().repeat(1000, 1) for i in (0, 1))  # type: ignore[attr-defined]
    codec = LowRank(2, PER_COMPONENT, PER_COMPONENT)
    encoded = codec.join(codec.left.encode(left), codec.right.encode(right))
    assert encoded.shape == (40_000, 30_000)
    for name in ("decode", "decode_rows"):
        monkeypatch.setattr(LowRank, name, None)
    empty = torch.empty

    def bounded(*shape: Any, **kwargs: Any) -> Tensor:
        made = empty(*shape, **kwargs)
        assert made.numel() < 2**24
        return made

    monkeypatch.setattr(torch, "empty", bounded)
    tracemalloc.start()
    found = encoded.matmul(gaussian((2, 30_000), 1))
    tracemalloc.stop()
    factors = [factor.decode().double() for factor in codec.factors(encoded)]
    expected = (gaussian((2, 30_000), 1).double() @ factors[1]) @ factors[0].T
    assert float((found - expected).norm() / expected.norm()) <= tolerance(torch.float32, 30_000)


@pytest.mark.parametrize("method", PUBLISHED)
def test_rank_one_on_one_row_or_column_is_exact(method: str) -> None:
    for shape in ((1, 67), (67, 1), (1, 1)):
        matrix = gaussian(shape)
        decoded = LowRank(1, FP32, FP32).encode(matrix, options={"method": method}).decode()
        assert float((decoded - matrix).norm()) <= tolerance(torch.float32, 68) * float(matrix.norm())


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("text", ["lr3(fp32)", "lr3(mm8)", "lr3(lm4o)"])
def test_zero_and_constant_matrices(text: str, method: str) -> None:
    codec = parse(text)
    assert not bool(codec.encode(torch.zeros(12, 8), options={"method": method}).decode().any())
    constant = torch.full((12, 8), -2.5)
    found = codec.encode(constant, options={"method": method}).decode()
    # factors of the one component are constant up to a sign; the others are rounding, and small
    assert float((found - constant).norm() / constant.norm()) <= (0.2 if "fp32" not in text else 1e-5)


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_same_seed_gives_the_same_bytes(method: str) -> None:
    matrix, codec = gaussian((30, 20)), LowRank(4, MinMax(16), MinMax(16))
    before = torch.random.get_rng_state()
    first, again, other = (codec.encode(matrix, seed=seed, options={"method": method}) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(t, again.tensors[name]) for name, t in first.tensors.items())
    assert (method == "dsvd") == all(torch.equal(t, other.tensors[name]) for name, t in first.tensors.items())


def test_dither_reaches_the_factors() -> None:
    matrix, codec = with_spectrum((60, 40), [2.0, 1.5, 1.2, 1.0]), LowRank(4, MinMax(16), MinMax(16))
    nearest, dithered = (codec.encode(matrix, options={"method": "lplr", "rounding": rounding})
                         for rounding in ("nearest", "dithered"))
    assert measure(matrix, nearest).relative_error < measure(matrix, dithered).relative_error < 1


def test_shared_tables_are_trained_on_factors() -> None:
    samples = [with_spectrum((40, 30), [3.0, 2.0, 1.0]) * scale for scale in (1.0, 1e20)]
    codec = parse("lr3(tab3;mm8)")
    tables = codec.train(samples)
    assert set(tables) == {"left/table"}
    assert codec.encode(samples[0], tables=tables, options={"method": "lplr"}).check()
    assert LowRank(3, FP32, FP32).train(samples) == {}


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-40])
def test_scale_is_split_between_the_factors(scale: float) -> None:
    """Neither factor leaves bf16 or float32; by powers of two, so that only subnormal results differ."""
    matrix = gaussian((24, 16))
    for method in PUBLISHED:
        plain, scaled = (measure(m, LowRank(6, PER_COMPONENT, PER_COMPONENT).encode(m, options={"method": method}))
                         for m in (matrix, matrix * scale))
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-2)


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.1, 8), st.integers(1, 16), st.integers(1, 16))
def test_the_published_rule(out: int, width: int, rate: float, left: int, right: int) -> None:
    rank = rank_for((out, width), rate, left, right)
    assert rank * (out * left + width * right) <= rate * out * width * (1 + 1e-12)
    assert (rank + 1) * (out * left + width * right) > rate * out * width * (1 - 1e-12)


def test_published_ranks() -> None:
    assert rank_for((512, 384), 1, 8, 8) == 27
    assert rank_for((1000, 1000), 1, 4, 8) == 83
    assert rank_for((1000, 1000), 2, 8, 4) == 166
    for bad in ((0, 8, 8), (1, 0, 8), (1, 8, -1), (float("nan"), 8, 8), ("1", 8, 8)):  # B = 0 divides by zero there
        with pytest.raises(CodecConfigError, match="positive number"):
            rank_for((4, 4), *bad)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="empty"):
        rank_for((0, 4), 1, 8, 8)


def test_bad_ranks() -> None:
    """The released code accepts r > d silently, and r=None ends in a TypeError."""
    for rank in (0, -1, None, 2.0, True):
        with pytest.raises(CodecConfigError, match="low_rank: rank"):
            LowRank(rank, FP32, FP32)  # type: ignore[arg-type]
    for shape in ((4, 9), (9, 4), (1, 9)):
        with pytest.raises(CodecConfigError, match=f"rank 5 is above {min(shape)}.* rows .*width"):
            LowRank(5, FP32, FP32).encode(gaussian(shape))
    with pytest.raises(CodecConfigError, match="rank"):
        parse("lr0(mm8)")


def test_bad_codecs_and_strings() -> None:
    assert parse("lr3(mm8)") == parse("lr3(mm8;mm8)") == LowRank(3, MinMax(256), MinMax(256))
    with pytest.raises(CodecConfigError, match="left and right"):
        LowRank(3, "mm8", FP32)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="one or two codecs"):
        parse("lr3(mm8;mm8;mm8)")
    with pytest.raises(CodecConfigError, match="option method"):
        LowRank(2, FP32, FP32).encode(gaussian((4, 4)), options={"method": "iterative_lplr"})
    with pytest.raises(CodecConfigError, match="no encoder option"):
        LowRank(2, FP32, FP32).encode(gaussian((4, 4)), options={"q": 3})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_bad_matrices(method: str) -> None:
    """NaN raised LinAlgError in the released code, infinity gave garbage in silence."""
    codec = LowRank(2, MinMax(256), MinMax(256))
    for bad in (float("nan"), float("inf"), -float("inf")):
        matrix = gaussian((8, 6))
        matrix[3, 2] = bad
        with pytest.raises(NonFiniteError):
            codec.encode(matrix, options={"method": method})
    for empty in (torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(4)):
        with pytest.raises(CodecConfigError):
            codec.encode(empty, options={"method": method})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", PUBLISHED)
def test_any_dtype_in_float32_out(method: str, dtype: torch.dtype) -> None:
    """DSVD and 16 bits return float64 in the released code."""
    matrix = gaussian((20, 12)).to(dtype)
    decoded = parse("lr4(mm16)").encode(matrix, options={"method": method}).decode()
    assert decoded.dtype == torch.float32
    reference = parse("lr4(mm16)").encode(matrix.float(), options={"method": method}).decode()
    assert float((decoded - reference).norm() / reference.norm()) <= 1e-3  # a step of 16 bits may flip


@pytest.mark.parametrize("name", PUBLISHED)
def test_families_run_the_published_method(name: str) -> None:
    matrix = with_spectrum((120, 90), (1.0 / (1 + torch.arange(60))).tolist())
    encoded = tersor.compress(matrix, rate=2, codec=name, seed=3)
    assert encoded.rate <= 2
    again = encoded.codec.encode(matrix, seed=3, options={"method": name})
    assert all(torch.equal(t, again.tensors[key]) for key, t in encoded.tensors.items())
    other = "dsvd" if name != "dsvd" else "lsvd"
    overridden = tersor.compress(matrix, rate=2, codec=name, seed=3, method=other)
    expected = encoded.codec.encode(matrix, seed=3, options={"method": other})
    assert all(torch.equal(t, overridden.tensors[key]) for key, t in expected.tensors.items())
    assert name in families()
    assert options(name) == {"method": name}


def test_other_families_have_no_options() -> None:
    assert options("nq") == options("qet_plus") == options("auto") == {}
    with pytest.raises(tersor.UnknownCodecError):
        options("nope")


@given(st.sampled_from(sorted(LOW_RANK_PRESETS)), st.integers(8, 300), st.integers(8, 300), st.floats(0.3, 9))
def test_fit_is_the_highest_rank_that_fits(name: str, out: int, width: int, rate: float) -> None:
    shape, nbytes = (out, width), int(rate * out * width / 8)
    try:
        (codec,) = candidates(name, shape, nbytes)
    except BudgetError as failure:
        least = failure.least_bytes
        assert least > nbytes
        assert candidates(name, shape, least)
        return
    assert codec.nbytes(shape) <= nbytes
    if isinstance(codec, LowRank) and codec.rank < min(shape):
        assert LowRank(codec.rank + 1, codec.left, codec.right).nbytes(shape) > nbytes
    if isinstance(codec, MinMax) and codec.levels < 256:
        assert MinMax(codec.levels + 1).nbytes(shape) > nbytes


def test_presets() -> None:
    preset = LOW_RANK_PRESETS["lplr"]
    assert isinstance(preset, LowRankPreset)
    assert (preset.left_bits, preset.right_bits) == (8, 8)
    assert preset.from_rate((512, 384), 1) == LowRank(27, MinMax(256), MinMax(256))
    assert preset.with_bits(4, 8).from_rate((1000, 1000), 1).spec() == "lr83(mm4;mm8)"
    assert preset.from_rate((8, 8), 64).rank == 8  # never above the matrix's
    with pytest.raises(BudgetError, match="one component") as caught:
        preset.from_rate((10, 10), 0.1)
    assert caught.value.least_bytes == 20
    for bits in (0, 17, 2.5, True):
        with pytest.raises(CodecConfigError, match="whole number of bits"):
            preset.with_bits(8, bits)  # type: ignore[arg-type]
    assert NaivePreset().from_rate((4, 4), 2.0) == MinMax(4)
    with pytest.raises(CodecConfigError, match="whole number of bits"):
        NaivePreset().from_rate((4, 4), 1.5)
    for one in LOW_RANK_PRESETS.values():
        rungs = one.rungs((200, 100))
        sizes = [rung.nbytes((200, 100)) for rung in rungs]
        assert sizes == sorted(set(sizes))
        assert len(sizes) >= 6


def test_a_fitted_bit_beats_min_max_and_a_flat_spectrum_beats_low_rank() -> None:
    """What the published comparison leaves out: docs/codecs/low_rank.md."""
    matrix = gaussian((200, 150))
    found = {name: measure(matrix, encode(codec, matrix, **how)).relative_error for name, codec, how in (
        ("nq", parse("mm1"), {}), ("fitted", parse("lm1o"), {}),
        ("lplr", LOW_RANK_PRESETS["lplr"].fit((200, 150), 200 * 150 // 8), {"method": "lplr"}))}
    assert found["fitted"] < 0.5 * found["lplr"] < 0.1 * found["nq"]


def test_a_sum_with_low_rank_alternates_and_ends_with_feedback() -> None:
    """The low-rank stage is spectral, so that turns and the backbone's feedback are on without being asked for."""
    matrix, inputs = with_spectrum((96, 64), (1 + torch.arange(64)) ** -0.5), gaussian((300, 64), 3)
    hessian = inputs.T @ torch.diag(torch.logspace(0, -2, 300)) @ inputs
    codec = parse("sum(lr6(al36;al36);rot,sym12)")
    assert codec.traits().spectral
    assert not parse("sum(lm2;lm2)").traits().spectral

    def error(**options: object) -> float:
        return measure(matrix, codec.encode(matrix, hessian=hessian, options=options), hessian).distortion

    turns = error()
    assert turns == error(alternations=4) < error(alternations=1)
    assert error(feedback=True) < turns
