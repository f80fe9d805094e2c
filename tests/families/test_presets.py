"""The published memory rule on worked examples, and our own: within the bytes, and the most words there are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.codecs import LearnedRotation, Product, Scalar, Sum, Swap
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError
from tersor.families.ladder import RATES
from tersor.families.qet import PRESETS, Preset, published_nbytes
from tersor.quality import measure
from tersor.registry import from_config, parse
from tersor.testing import gaussian


def test_the_published_structures() -> None:
    shape = (1024, 128)
    words = {name: (16,) * len(preset.layers) for name, preset in PRESETS.items()}
    found = {name: str(preset.codec(shape, words[name])) for name, preset in PRESETS.items()}
    assert found == {"pq": "pq4x16f32", "opq": "opqf32,pq4x16f32", "hera": "swap3,pq4x16f32",
                     "qet_vanilla": "swap3,pq4x16f32", "qet": "sum(swap3,pq4x16b10;pq4x16b10)"}
    assert PRESETS["qet"].split == (0.7, 0.3)
    assert dataclasses.replace(PRESETS["hera"], name="qet_vanilla") == PRESETS["qet_vanilla"]


def slow_words(rows: int, width: int, groups: int, bits: int, budget: float) -> int:
    """The published rule word by word: the largest Ks with Ks D bits + N M ceil(log2 Ks) within the budget."""
    best = 0
    for words in range(1, rows + 1):
        if words * width * bits + rows * groups * math.ceil(math.log2(words)) <= budget:
            best = words
    return best


@pytest.mark.parametrize("rate", [2.5, 4.0, 8.0])
@pytest.mark.parametrize("shape", [(1024, 128), (384, 384), (200, 64)])
@pytest.mark.parametrize("name", ["pq", "qet_vanilla", "qet"])
def test_the_published_rule_word_by_word(name: str, shape: tuple[int, int], rate: float) -> None:
    preset, nbytes = PRESETS[name], math.floor(rate * shape[0] * shape[1] / 8)
    left = 8 * nbytes - sum(preset.layers) * shape[0] * shape[1] / 2
    bits = 10 if name == "qet" else 32
    expected = [slow_words(*shape, shape[1] // 4, bits, left * share) for share in preset.split]
    if min(expected) < 2:
        with pytest.raises(BudgetError, match="published rule"):
            preset.from_memory(shape, nbytes)
        return
    codec = preset.from_memory(shape, nbytes)
    assert [product.words for product in products(codec)] == expected
    assert published_nbytes(codec, shape) <= nbytes


def products(codec: Codec) -> list[Product]:
    if isinstance(codec, Product):
        return [codec]
    return [found for child in codec.children().values() for found in products(child)]


def test_a_worked_example() -> None:
    """1024 x 128 at 8 bits are 1048576 bits: 192 words of 128 fp32 numbers, and 32 codes of 8 bits a row."""
    assert PRESETS["pq"].from_memory((1024, 128), 131072) == Product(4, 192, codebook="fp32")
    assert 192 * 128 * 32 + 1024 * 32 * 8 == 1048576  # to the bit
    assert published_nbytes(Product(4, 192, codebook="fp32"), (1024, 128)) == 131072
    # masks of three layers take 196608 bits; of the 851968 left, 144 words take 589824 and codes 262144: all
    assert PRESETS["hera"].from_memory((1024, 128), 131072) == Swap(Product(4, 144, codebook="fp32"), 3)


def test_the_readme_example_of_the_paper() -> None:
    """10000 x 128, M = 4, 256 bytes: the released code asks k-means for 0 clusters; masks alone take 240000 bytes."""
    for name, masks in (("pq", 0), ("qet_vanilla", 240_000), ("qet", 240_000)):
        with pytest.raises(BudgetError) as caught:
            PRESETS[name].with_dim(32).from_memory((10_000, 128), 256)
        least = caught.value.least_bytes
        assert f"need {least} bytes" in str(caught.value)
        assert least > masks
        codec = PRESETS[name].with_dim(32).from_memory((10_000, 128), least)  # what the error names is enough
        assert min(product.words for product in products(codec)) >= 2
        assert {product.dim for product in products(codec)} == {32}
        with pytest.raises(BudgetError):
            PRESETS[name].with_dim(32).from_memory((10_000, 128), least - 1)


def test_opq_is_charged_its_rotation() -> None:
    shape = (4096, 64)
    codec = PRESETS["opq"].from_memory(shape, 65536)
    assert isinstance(codec, LearnedRotation)
    assert published_nbytes(codec, shape) - published_nbytes(codec.inner, shape) == 64 * 64 * 4
    with pytest.raises(BudgetError, match="masks and rotation take 16384"):
        PRESETS["opq"].from_memory(shape, 16_000)


def test_the_published_accounting() -> None:
    shape = (1000, 64)
    codec = parse("sum(swap3,pq4x100b10;pq4x70b10)")
    assert published_nbytes(codec, shape) == math.ceil(
        (100 * 64 * 10 + 1000 * 16 * 7 + 3 * 1000 * 32 + 70 * 64 * 10 + 1000 * 16 * 7) / 8)
    assert published_nbytes(parse("pq4x100m"), shape) == (100 * 4 * 16 + 1000 * 16 * 7) // 8
    for text in ("lm3", "swap3,lm3"):
        with pytest.raises(CodecConfigError, match="not of the QET family"):
            published_nbytes(parse(text), shape)


def refused(call: Callable[[], Codec]) -> BudgetError | None:
    """Return the error of a budget that is too small, or None."""
    try:
        call()
    except BudgetError as error:
        return error
    return None


names = st.sampled_from(sorted(PRESETS))
heights = st.integers(2, 1500)
widths = st.integers(1, 40).map(lambda n: 8 * n)


@settings(max_examples=150)
@given(names, heights, widths, st.floats(0.3, 12), st.sampled_from([1, 2, 4, 8]))
def test_the_published_budget_is_kept_by_the_published_accounting(name: str, height: int, width: int, rate: float,
                                                                  dim: int) -> None:
    preset, shape, nbytes = PRESETS[name].with_dim(dim), (height, width), math.floor(rate * height * width / 8)
    failure = refused(lambda: preset.from_memory(shape, nbytes))
    if failure:
        assert failure.least_bytes > nbytes
        return
    codec = preset.from_memory(shape, nbytes)
    assert published_nbytes(codec, shape) <= nbytes
    assert from_config(codec.to_config()) == codec


@settings(max_examples=150)
@given(names, heights, widths, st.floats(0.3, 12), st.sampled_from([1, 2, 4, 8]))
def test_fit_never_exceeds_and_wastes_less_than_a_word(name: str, height: int, width: int, rate: float,
                                                       dim: int) -> None:
    preset, shape, nbytes = PRESETS[name].with_dim(dim), (height, width), math.floor(rate * height * width / 8)
    failure = refused(lambda: preset.fit(shape, nbytes))
    if failure:
        least = preset.codec(shape, (2,) * len(preset.layers))
        assert least.nbytes(shape) > nbytes
        assert failure.least_bytes == least.nbytes(shape)
        assert preset.fit(shape, least.nbytes(shape)).nbytes(shape) <= least.nbytes(shape)
        return
    codec = preset.fit(shape, nbytes)
    assert codec.nbytes(shape) <= nbytes
    words = [product.words for product in products(codec)]
    for more in range(words[-1] + 1, min(height, words[-1] + 40) + 1):  # one stage more: the last took all that is left
        assert preset.codec(shape, (*words[:-1], more)).nbytes(shape) > nbytes


def test_fit_is_exhaustive_where_codes_pack_unevenly() -> None:
    """Codes of 511 levels take more than those of 512: the largest number of words, not the first that fails."""
    preset, shape = PRESETS["pq"].with_dim(1), (1024, 512)
    for nbytes in range(600_000, 1_300_000, 20_011):
        best = max(words for words in range(2, 600) if Product(1, words, codebook="fp32").nbytes(shape) <= nbytes)
        found = products(preset.fit(shape, nbytes))[0].words
        assert found == best or found >= 599


def test_stages_split_what_masks_leave() -> None:
    preset, shape = PRESETS["qet"], (2048, 256)
    nbytes = 4 * 2048 * 256 // 8
    codec = preset.fit(shape, nbytes)
    assert isinstance(codec, Sum)
    first, second = (product.nbytes(shape) for product in products(codec))
    left = nbytes - 3 * 2048 * 256 // 2 // 8
    step = Product(4, 3, codebook="b10").nbytes(shape)
    assert first <= 0.7 * left
    assert first >= 0.7 * left - step
    assert second >= 0.3 * left - step
    tight = preset.fit(shape, preset.codec(shape, (2, 2)).nbytes(shape))  # a share below the least is filled up
    assert [product.words for product in products(tight)] == [2, 2]


@pytest.mark.parametrize(("width", "dim", "layers", "expected"), [
    (128, 4, 3, 4), (72, 4, 3, 4), (36, 5, 0, 4), (70, 4, 0, 2), (70, 4, 1, 1), (48, 5, 3, 3), (97, 4, 0, 1),
    (128, 32, 3, 32), (8, 16, 3, 1),
])
def test_the_dim_that_divides(width: int, dim: int, layers: int, expected: int) -> None:
    """The preset's own where it divides the width, as published; else the largest that no block of the swaps cuts."""
    preset = Preset("mine", (layers,), (1.0,), "fp16", dim=dim)
    assert products(preset.codec((64, width), (4,)))[0].dim == expected


def test_layers_are_not_reduced_in_silence() -> None:
    for method in (lambda p: p.fit((64, 12), 10_000), lambda p: p.from_memory((64, 12), 10_000),
                   lambda p: p.rungs((64, 12))):
        with pytest.raises(CodecConfigError, match="width of 12 admits at most 2"):
            method(PRESETS["qet"])
    fewer = dataclasses.replace(PRESETS["qet"], layers=(2, 0))
    assert str(fewer.fit((64, 12), 300)).startswith("sum(swap2,pq")


def test_too_few_rows() -> None:
    for method in ("fit", "from_memory"):
        with pytest.raises(CodecConfigError, match="fewer rows than codewords"):
            getattr(PRESETS["pq"], method)((1, 64), 1000)
    assert products(PRESETS["pq"].fit((5, 64), 10**6))[0].words == 5  # at most one a row
    assert products(PRESETS["pq"].from_memory((5, 64), 10**6))[0].words == 5


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_rungs_are_distinct_and_within_their_rates(name: str) -> None:
    shape = (600, 64)
    rungs = PRESETS[name].rungs(shape)
    assert len(set(rungs)) == len(rungs) > 3
    rates = [rung.rate(shape) for rung in rungs]
    assert rates == sorted(rates)
    assert max(rates) <= max(RATES)
    for rung in rungs:
        assert any(rung == PRESETS[name].fit(shape, math.floor(rate * 600 * 64 / 8)) for rate in RATES
                   if rate >= rung.rate(shape))


def test_presets_encode_and_rates_are_measured() -> None:
    matrix = gaussian((300, 64))
    for preset in PRESETS.values():
        previous = math.inf
        for codec in preset.rungs((300, 64))[-3:]:
            encoded = codec.encode(matrix)
            assert encoded.nbytes == codec.nbytes((300, 64))
            error = measure(matrix, encoded).relative_error
            assert error < previous
            previous = error


def test_the_published_size_of_the_claim_on_noise() -> None:
    """qet.md 7.1: at 8 bits and fp32 codebooks charged to the budget, QET has about 5 % of PQ's error on pure noise."""
    matrix = gaussian((1024, 128))
    errors = {name: measure(matrix, PRESETS[name].from_memory((1024, 128), 131072).encode(matrix)).relative_error
              for name in ("pq", "qet_vanilla", "qet")}
    assert errors["pq"] == pytest.approx(0.0712, rel=0.05)
    assert errors["qet_vanilla"] == pytest.approx(0.0280, rel=0.05)
    assert errors["qet"] == pytest.approx(0.0035, rel=0.1)
    scalar = measure(matrix, Scalar(128).encode(matrix))  # Lloyd-Max of 128 levels, fewer bytes than any of these
    assert scalar.rate < 8
    assert scalar.relative_error < errors["qet"] / 10


@pytest.mark.parametrize("change", [{"layers": ()}, {"layers": (3, 0)}, {"split": (0.5,)}, {"layers": (-1,)},
                                    {"learned_rotation": True, "layers": (1,)}, {"dim": 0}, {"dim": 2.0}])
def test_bad_fields(change: dict[str, object]) -> None:
    with pytest.raises(CodecConfigError, match="preset 'pq'"):
        dataclasses.replace(PRESETS["pq"], **change)  # type: ignore[arg-type]
