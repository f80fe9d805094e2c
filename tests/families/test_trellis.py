"""Efforts, the windows that they take, ladders for every shape, and what a survey tries in a trellis's place."""

from __future__ import annotations

import itertools
import math

import pytest

import tersor
from tersor.codecs import FoldedTrellis, MixedRows, Rotated, Sum, Symmetric, Trellis
from tersor.codecs.trellis.filters import shelf
from tersor.codecs.trellis.streamed import Streamed
from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError
from tersor.families import AUTO, DEFAULT, EFFORTS, budgeted, candidates, effort_of, stand_in
from tersor.families.trellis import CIRCLE, WINDOWS, error_of, tried_on_normal, window
from tersor.quality import measure
from tersor.testing import gaussian, outliers

LARGE = (512, 512)


def windows(codec: Codec) -> list[int]:
    """Return the windows of all trellis codes in a codec."""
    own = [codec.memory] if isinstance(codec, Streamed) else []
    return own + [memory for child in codec.children().values() for memory in windows(child)]


@pytest.mark.parametrize("kind", [Trellis, FoldedTrellis])
@pytest.mark.parametrize("effort", EFFORTS)
def test_a_rate_takes_the_longest_window_within_an_effort(effort: str, kind: type[Streamed]) -> None:
    for rate in {rate for rate, _ in kind.packaged()}:
        there = [memory for other, memory in kind.packaged() if other == rate]
        within = [memory for memory in there if memory <= WINDOWS[effort]]
        assert window(kind, rate, effort) == (max(within) if within else min(there))
        short = window(kind, rate, effort, 40)
        assert short is None or short * CIRCLE <= 40 * rate


def test_codes_are_linear_from_two_bits_or_folded_for_less_error() -> None:
    for family, effort in itertools.product(("trellis", "folded"), EFFORTS):
        for rung in (code for ladder in budgeted(family, effort) for code in ladder.fixed()):
            inner = getattr(rung, "inner", None)
            if isinstance(inner, Streamed):
                assert isinstance(inner, Trellis if family == "trellis" and inner.bits >= 2 else FoldedTrellis)
    assert {error_of(FoldedTrellis(bits)) < error_of(Trellis(bits)) for bits in (2.0, 3.0, 4.0)} == {True}


EVERY = [kind(bits, memory, "in", edition) for kind in (Trellis, FoldedTrellis)
         for bits, memory, edition in kind.editions()]
SHORT, LONG = ([one for one in EVERY if (one.memory <= 10) == short] for short in (True, False))


@pytest.mark.parametrize("codec", [*SHORT, *(pytest.param(one, marks=pytest.mark.slow) for one in LONG)],
                         ids=lambda codec: codec.spec())
def test_packaged_errors_are_what_the_codes_have(codec: Streamed) -> None:
    # a sum of 16,384 squares in float32, in any order, and ties that another processor may break otherwise
    assert tried_on_normal(codec) == pytest.approx(error_of(codec), rel=1e-4)


def test_every_packaged_code_has_its_error() -> None:
    assert set(shelf()["errors"]) == {codec.spec() for codec in EVERY}


def test_more_effort_is_less_error_in_as_many_bytes() -> None:
    matrix = gaussian((64, 512), 3)
    for rate in (2.04, 3.04, 4.04):
        found = [tersor.compress(matrix, rate, "trellis", effort=effort) for effort in EFFORTS]
        errors = [measure(matrix, one).relative_error for one in found]
        assert sum(windows(found[0].codec)) < sum(windows(found[1].codec)) < sum(windows(found[2].codec))
        assert errors[0] > errors[1] > errors[2]
        assert len({one.nbytes for one in found}) == 1
    assert tersor.compress(matrix, 2.04, "trellis").codec == found_by("normal", 2.04, matrix.shape)


def found_by(effort: str, rate: float, shape: tuple[int, ...]) -> Codec:
    return candidates("trellis", (shape[0], shape[1]), math.floor(rate * math.prod(shape) / 8), effort)[0]


def test_who_reads_an_effort() -> None:
    assert DEFAULT == "trellis"
    assert [effort_of(name, None) for name in ("trellis", AUTO, "qet_plus", "rot,tr2")] == ["normal", "normal", None,
                                                                                         None]
    assert effort_of(AUTO, "best") == "best"
    with pytest.raises(CodecConfigError, match="expected one of fast, normal, best, found 'quick'"):
        effort_of("trellis", "quick")
    for name in ("qet_plus", "rot,tr2x8"):
        with pytest.raises(CodecConfigError, match=r"reads no effort, found 'fast'.*auto, trellis"):
            tersor.compress(gaussian((8, 64), 1), codec=name, effort="fast")
    fast = candidates(AUTO, LARGE, LARGE[0] * LARGE[1] // 4, "fast")
    assert [windows(codec) for codec in fast if windows(codec)] == [[8, 12]]  # 2 bits and 1.75: see the ladder


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (47, 300), (48, 48), (50, 8), (300, 47), (333, 777), (4096, 1)])
def test_ladders_rise_whatever_the_shape(effort: str, shape: tuple[int, int]) -> None:
    for ladder in budgeted("trellis", effort):
        rungs = ladder.rungs(shape)
        sizes = [rung.nbytes(shape) for rung in rungs]
        assert len(set(rungs)) == len(rungs)
        line = shape[1] if ladder.alone else shape[0]
        assert any(map(windows, rungs)) == (line >= 48)
        for nbytes in (min(sizes), sum(sizes) // len(sizes), max(sizes) + 1):
            assert ladder.fit(shape, nbytes).nbytes(shape) <= nbytes


def test_parts_of_a_mix_are_long_enough_for_lines_along_outputs() -> None:
    fed = next(ladder for ladder in budgeted("trellis") if not ladder.alone)
    shape, mixed = (256, 256), set[int]()
    for nbytes in range(8 * 2560, 8 * 3072, 64):
        codec = fed.fit(shape, nbytes)
        assert isinstance(codec, Rotated)
        if isinstance(codec.inner, MixedRows):
            mixed.add(codec.inner.count)
    assert mixed
    assert all(64 <= count <= 192 for count in mixed)


@pytest.mark.parametrize(("effort", "shape"), [("normal", (48, 64)), ("best", (130, 96))])
def test_rungs_are_no_worse_than_symmetric_codebooks_of_as_many_bytes(effort: str, shape: tuple[int, int]) -> None:
    """With error feedback; within what matrices of some thousand numbers differ by."""
    x = outliers((400, shape[1]), 3)
    hessian, matrix = x.T @ x, gaussian(shape, 5)
    ours, theirs = ([rung for ladder in budgeted(*family) if ladder.planned for rung in ladder.rungs(shape)]
                    for family in (("trellis", effort), ("qet_plus",)))

    def error(codec: Codec) -> float:
        return measure(matrix, codec.encode(matrix, hessian=hessian, options={"feedback": True}), hessian).distortion

    pairs = [(one, other) for one in ours if windows(one) for other in theirs
             if one.nbytes(shape) == other.nbytes(shape)]
    assert len(pairs) >= 4
    for one, other in pairs:
        assert error(one) <= 1.03 * error(other), (str(one), str(other))


def test_what_stands_in_is_fast_and_as_good_as_it_says() -> None:
    """One code for all rates behind a rotation, and one of the same rate without."""
    matrix = gaussian((96, 512), 9)
    listed = {text: stand_in(tersor.parse(text), (96, 512)) for text in
              ("rot,tr2o", "rot,tr1.5no", "rot,tr3x14", "rot,sum(tr4o;tr2o)", "tr2o", "sum(tr4o;sym8)")}
    for text, (other, factor) in listed.items():
        codec = tersor.parse(text)
        assert max(windows(other)) <= 9
        assert "o" not in other.spec().removeprefix("rot,")
        want, found = (measure(matrix, one.encode(matrix)).relative_error for one in (codec, other))
        # lines of 96 are not of 256, nor leftovers normal
        assert factor * found == pytest.approx(want, rel=0.12 if "sum" in text else 0.03)
    assert len({other for text, (other, _) in listed.items() if text.startswith("rot,tr")}) == 1
    for codec in (tersor.parse("rot,sym16"), Rotated(Sum((Symmetric(16), Symmetric(8)))), tersor.parse("lm3")):
        assert stand_in(codec, LARGE) == (codec, 1.0)
