"""A family meets a ceiling from below, whatever the rate and shape, or names the least rung."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.codecs import MixedRows, Scalar, Uniform
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, UnknownCodecError
from tersor.families import AUTO, AUTO_FAMILIES, FAMILIES, Budgeted, Ladder, budgeted, candidates, families
from tersor.families.qet import PRESETS
from tersor.quality import measure
from tersor.testing import gaussian, outliers, student_t3

NAMES = list(AUTO_FAMILIES)
LADDERS = [(name, i) for name in NAMES for i, one in enumerate(FAMILIES[name]) if one.alone]


def ladder_of(name: str, index: int) -> Budgeted:
    return FAMILIES[name][index]

heights = st.integers(200, 3000)
rates = st.floats(0.15, 4.95).map(lambda power: 2.0**power)  # 1.11 to 31 bits


@pytest.mark.parametrize(("name", "index"), LADDERS)
@settings(max_examples=60, deadline=None)
@given(height=heights, width=st.integers(384, 9000), rate=rates)
def test_stored_bytes_lie_just_below_the_ceiling(name: str, index: int, height: int, width: int, rate: float) -> None:
    """At most the ceiling, and within .5 %: a row is at most 1/200 of the matrix, and the mask one bit a row."""
    ladder, ceiling = ladder_of(name, index), math.floor(rate * height * width / 8)
    least = min(rung.nbytes((height, width)) for rung in ladder.rungs((height, width)))
    if ceiling < least:
        with pytest.raises(BudgetError):
            ladder.fit((height, width), ceiling)
        return
    stored = ladder.fit((height, width), ceiling).nbytes((height, width))
    assert stored <= ceiling
    assert stored >= 0.995 * ceiling


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(height=heights, width=st.integers(16, 400), rate=st.floats(3.0, 8.0))
def test_a_family_is_within_half_a_percent_at_any_width(name: str, height: int, width: int, rate: float) -> None:
    """Where a mask of one bit a row would cost too much, the rows are mixed without one."""
    ceiling = math.floor(rate * height * width / 8)
    stored = [codec.nbytes((height, width)) for codec in candidates(name, (height, width), ceiling)]
    assert max(stored) <= ceiling
    assert max(stored) >= 0.995 * ceiling


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(height=heights, width=st.integers(1, 400), rate=rates)
def test_narrow_matrices_lose_a_row_and_the_mask(name: str, height: int, width: int, rate: float) -> None:
    """The slack of a narrow matrix: the mask, one row on the dearer rung, and what a second table and padding cost."""
    shape, ceiling = (height, width), math.floor(rate * height * width / 8)
    for index in (i for other, i in LADDERS if other == name):
        ladder = ladder_of(name, index)

        def cost(rung: Codec) -> int:
            return rung.nbytes(shape)

        steps = sorted(ladder.rungs(shape), key=cost)
        if not cost(steps[0]) <= ceiling < cost(steps[-1]):
            continue
        stored = ladder.fit(shape, ceiling).nbytes(shape)
        below = [step for step in steps if cost(step) <= ceiling][-1]
        above = steps[steps.index(below) + 1]
        slack = cost(MixedRows(above, below, 2)) - cost(below) + 4 * 7  # a part wastes up to a word
        assert stored <= ceiling <= stored + slack


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 199), width=st.integers(1, 3000), rate=st.floats(0.01, 40))
def test_small_matrices_never_exceed_the_ceiling(height: int, width: int, rate: float) -> None:
    ceiling = math.floor(rate * height * width / 8)
    rungs = [rung for ladder in budgeted(AUTO) for rung in ladder.rungs((height, width))]
    least = min(rung.nbytes((height, width)) for rung in rungs)
    if ceiling < least:
        with pytest.raises(BudgetError) as caught:
            candidates(AUTO, (height, width), ceiling)
        assert caught.value.least_bytes == least
    else:
        found = candidates(AUTO, (height, width), ceiling)
        assert found
        assert all(codec.nbytes((height, width)) <= ceiling for codec in found)


@pytest.mark.parametrize("name", [*NAMES, AUTO])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 256), (200, 1000)])
def test_below_the_least_rung(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(BudgetError) as caught:
        candidates(name, shape, 0)
    rungs = [rung for ladder in budgeted(name) for rung in ladder.rungs(shape)]
    smallest = min(rungs, key=lambda rung: rung.nbytes(shape))
    least = smallest.rate(shape)
    assert caught.value.least_bytes == smallest.nbytes(shape)
    assert f"the least rung '{smallest}'" in str(caught.value)
    assert str(smallest.nbytes(shape)) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    matrix = gaussian(shape)
    assert tersor.compress(matrix, rate=least, codec=name).rate == least  # what the error names is reachable
    with pytest.raises(BudgetError):
        tersor.compress(matrix, rate=least * (1 - 1e-9), codec=name)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_least_is_reachable_in_floating_point(height: int, width: int) -> None:
    from tersor.api import _budget
    nbytes = Scalar(2).nbytes((height, width))
    assert _budget(Scalar(2).rate((height, width)), (height, width)) == nbytes


MATRICES = {"gaussian": gaussian((105, 192)), "student": student_t3((105, 192)), "outliers": outliers((105, 192)),
            "offset": gaussian((105, 192)).abs() + 3}


@pytest.mark.parametrize("kind", list(MATRICES))
@pytest.mark.parametrize("rate", [1.3, 2.5, 5.1])
def test_auto_is_never_worse_than_a_family(kind: str, rate: float) -> None:
    matrix = MATRICES[kind]
    best = measure(matrix, tersor.compress(matrix, rate=rate))
    assert best.rate <= rate
    found = {name: measure(matrix, tersor.compress(matrix, rate=rate, codec=name)) for name in NAMES}
    assert all(best.distortion <= quality.distortion for quality in found.values())
    assert best.distortion == min(quality.distortion for quality in found.values())
    assert all(quality.rate <= rate for quality in found.values())


def test_auto_under_a_hessian() -> None:
    matrix, x = MATRICES["outliers"], outliers((500, 192), 7)
    hessian = x.T @ x
    best = measure(matrix, tersor.compress(matrix, rate=2.5, hessian=hessian), hessian)
    for name in NAMES:
        other = measure(matrix, tersor.compress(matrix, rate=2.5, codec=name, hessian=hessian), hessian)
        assert best.distortion <= other.distortion


def test_more_bytes_never_hurt_by_much() -> None:
    """Distortion falls with the rate, from rung to mix to rung."""
    matrix = MATRICES["gaussian"]
    found = [measure(matrix, tersor.compress(matrix, rate=rate)).distortion
             for rate in torch.linspace(1.1, 6.0, 12).tolist()]
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


def test_mixes_are_of_neighbours_and_rotations_go_around() -> None:
    codec = candidates("rotated_scalar", (256, 512), math.floor(2.2 * 256 * 512 / 8))[0]
    assert codec.id == "rotated"
    assert isinstance(codec.children()["inner"], MixedRows)
    ladder = Ladder((Uniform(4), Uniform(16)))
    assert ladder.fit((10, 64), Uniform(16).nbytes((10, 64))) == Uniform(16)
    assert ladder.fit((10, 64), Uniform(16).nbytes((10, 64)) - 1).spec() == "rows9(rtn4g64;rtn2g64)"
    assert ladder.fit((10, 64), Uniform(4).nbytes((10, 64))) == Uniform(4)


def test_unknown_families() -> None:
    with pytest.raises(UnknownCodecError) as caught:
        candidates("nope", (4, 4), 100)
    assert caught.value.known == families()
    assert families()[0] == AUTO


def test_published_presets_are_families_that_auto_leaves_out() -> None:
    shape = (512, 128)
    for name in PRESETS:
        assert name in families()
        assert name not in AUTO_FAMILIES
    matrix = gaussian(shape)
    for name in ("pq", "hera", "qet_vanilla", "qet"):
        encoded = tersor.compress(matrix, rate=4, codec=name)
        assert encoded.rate <= 4
        assert encoded.codec in [*candidates(name, shape, 512 * 128 // 2)]
    with pytest.raises(BudgetError) as caught:  # a dense fp32 rotation alone is 8 bits an element here
        tersor.compress(matrix, rate=4, codec="opq")
    assert (caught.value.least_bytes or 0) > 512 * 128


def test_qet_plus_beats_every_published_preset() -> None:
    matrix = gaussian((512, 128), 4)
    for rate in (2.5, 4.0, 6.0):
        ours = measure(matrix, tersor.compress(matrix, rate=rate, codec="qet_plus"))
        for name in ("pq", "qet_vanilla", "qet"):
            theirs = measure(matrix, tersor.compress(matrix, rate=rate, codec=name))
            assert ours.relative_error <= 0.75 * theirs.relative_error
