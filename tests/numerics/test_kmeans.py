"""Lloyd's two conditions, the descent of his objective, and what happens where clusters run empty."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.numerics import kmeans as module
from tersor.numerics.kmeans import assign, exponent_of, kmeans, times_power
from tersor.testing import gaussian, student_t3, tolerance

EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("poison")


def cloud(groups: int, count: int, dim: int, seed: int = 0, make: Callable[..., Tensor] = gaussian) -> Tensor:
    return make((groups * count, dim), seed).reshape(groups, count, dim)


def distances(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distances (groups, n, words), float64, by the definition."""
    difference = points.double().unsqueeze(2) - centroids.double().unsqueeze(1)
    spread = 1.0 if weights is None else weights.double().unsqueeze(2)
    return (difference.square() * spread).sum(-1)


def objective(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    return distances(points, centroids, weights).amin(-1).sum(-1)


WEIGHTS: dict[str, tuple[int, ...] | None] = {"none": None, "point": (3, 200, 1), "dimension": (3, 1, 4),
                                              "shared": (1, 1, 4), "both": (3, 200, 4)}


def weights_of(kind: str) -> Tensor | None:
    shape = WEIGHTS[kind]
    return None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(9)) + 0.05


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("words", [1, 2, 7, 64, 200])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_assign_is_brute_force(kind: str, words: int, offset: float) -> None:
    """The codeword chosen is as near as the nearest, to the rounding of distances of centred points."""
    points, weights = cloud(3, 200, 4) + offset, weights_of(kind)
    centroids = cloud(3, words, 4, 5) + offset
    found = assign(points, centroids, weights)
    assert found.dtype == torch.int64
    assert found.shape == (3, 200)
    every = distances(points, centroids, weights)
    chosen = every.gather(2, found.unsqueeze(-1)).squeeze(-1)
    reach = (points - centroids.mean(1, keepdim=True)).double().square().sum(-1)
    largest = (centroids - centroids.mean(1, keepdim=True)).double().square().sum(-1).amax(-1, keepdim=True)
    heaviest = 1.0 if weights is None else float(weights.max())
    # centring rounds coordinates of size `offset` to eps; the scores are sums of 5 to 8 products
    slack = 16 * EPS * heaviest * (reach + largest + (abs(offset) * (reach + largest).sqrt()))
    assert bool((chosen <= every.amin(-1) + slack).all())


def test_ties_go_to_the_lowest() -> None:
    centroids = torch.tensor([[[5.0], [1.0], [-1.0], [1.0], [-1.0]]])
    assert assign(torch.tensor([[[1.0], [-1.0], [9.0], [-9.0]]]), centroids).tolist() == [[1, 2, 0, 2]]
    assert assign(torch.zeros(2, 3, 2), torch.zeros(1, 4, 2)).tolist() == [[0] * 3] * 2


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    points = cloud(5, 130, 3)
    whole = kmeans(points, 16, seed=2)
    monkeypatch.setattr(module, "CACHE_FLOATS", 16 * 20)
    assert torch.allclose(whole, kmeans(points, 16, seed=2), rtol=0, atol=tolerance(torch.float32, 130))


def slow_lloyd(points: list[list[float]], centroids: list[list[float]], rounds: int) -> list[list[float]]:
    """Lloyd's algorithm in Python floats for one group without empty clusters."""
    for _ in range(rounds):
        members: list[list[list[float]]] = [[] for _ in centroids]
        for point in points:
            cost = [sum((a - b) ** 2 for a, b in zip(point, c, strict=True)) for c in centroids]
            members[cost.index(min(cost))].append(point)
        assert all(members)
        centroids = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in members]
    return centroids


@pytest.mark.parametrize("rounds", [0, 1, 2, 6, 20])
def test_equals_a_slow_reference(rounds: int) -> None:
    points = cloud(2, 90, 3)
    start = kmeans(points, 5, iterations=0, seed=1)
    found = kmeans(points, 5, iterations=rounds, seed=1)
    for group in range(2):
        expected = slow_lloyd(points[group].tolist(), start[group].tolist(), rounds)
        assert float((found[group].double() - torch.tensor(expected, dtype=torch.float64)).abs().max()) <= 90 * EPS * 4


@pytest.mark.parametrize("init", ["sample", "kmeans++"])
def test_the_start_is_of_points(init: str) -> None:
    points = cloud(4, 50, 2)
    start = kmeans(points, 20, iterations=0, init=init, seed=3)
    for group in range(4):
        near = torch.cdist(start[group].double(), points[group].double())
        assert float(near.amin(-1).max()) <= 4 * EPS * 4
        assert len(set(near.argmin(-1).tolist())) == 20  # distinct ones
    assert not torch.equal(start, kmeans(points, 20, iterations=0, init=init, seed=4))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("init", ["sample", "kmeans++"])
@pytest.mark.parametrize("words", [2, 30])
def test_the_objective_never_rises(kind: str, init: str, words: int) -> None:
    points, weights = cloud(3, 200, 4, 1, student_t3), weights_of(kind)
    errors = [objective(points, kmeans(points, words, iterations=i, init=init, weights=weights), weights)
              for i in range(12)]
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + tolerance(torch.float32, 200))).all())
    assert bool((errors[-1] < 0.95 * errors[0]).all())


def test_it_converges_to_both_conditions() -> None:
    """At the end every centroid is the mean of the points that are nearest to it."""
    points = cloud(2, 300, 2)
    centroids = kmeans(points, 6, iterations=500)
    codes = assign(points, centroids)
    for group, word in itertools.product(range(2), range(6)):
        mean = points[group, codes[group] == word].double().mean(0)
        assert float((centroids[group, word] - mean).abs().max()) <= tolerance(torch.float32, 300) * 4


def test_empty_clusters_take_the_worst_served_points() -> None:
    """20 copies of one point and 5 far ones: a start on copies alone still ends with every distinct point served."""
    points = torch.cat([torch.zeros(1, 20, 2), torch.tensor([[[100.0, i] for i in range(5)]])], 1)
    for seed in range(6):
        centroids = kmeans(points, 6, seed=seed)
        assert float(objective(points, centroids).sum()) <= 1e-6
        assert len(set(assign(points, centroids)[0].tolist())) == 6


@pytest.mark.parametrize("weights", [None, torch.ones(1, 1, 3)], ids=["plain", "weighted"])
def test_fewer_distinct_points_than_words(weights: Tensor | None) -> None:
    points = torch.full((2, 10, 3), 3.25)
    assert torch.equal(kmeans(points, 4, weights=weights), torch.full((2, 4, 3), 3.25))
    two = kmeans(torch.tensor([[[1.0], [2.0]] * 5]), 7)
    assert bool(((two - 1).abs().minimum((two - 2).abs()) <= 4 * EPS).all())
    assert torch.equal(kmeans(torch.zeros(1, 6, 2), 3, init="kmeans++"), torch.zeros(1, 3, 2))


def test_every_group_is_on_its_own() -> None:
    points = cloud(4, 60, 3)
    together = kmeans(points, 8, seed=5)
    for group in range(4):
        alone = kmeans(points[group : group + 1], 8, seed=5)[0]
        assert torch.allclose(together[group], alone, rtol=0, atol=tolerance(torch.float32, 60) * 4)


def test_a_weight_is_a_repetition() -> None:
    points = cloud(1, 40, 2)
    repeats = torch.arange(40) % 3 + 1
    start = kmeans(points, 4, iterations=0, seed=1)
    weighted = kmeans(points, 4, iterations=1, seed=1, weights=repeats.to(torch.float32).reshape(1, 40, 1))
    codes = assign(points, start)[0]
    for word in range(4):
        chosen = codes == word
        mean = (points[0, chosen] * repeats[chosen, None]).double().sum(0) / repeats[chosen].sum()
        assert float((weighted[0, word] - mean).abs().max()) <= 40 * EPS * 4


@pytest.mark.parametrize("kind", ["none", "both"])
def test_mini_batches_come_close(kind: str) -> None:
    points, weights = cloud(3, 200, 4), weights_of(kind)
    start, full, small = (objective(points, kmeans(points, 8, iterations=i, batch=b, weights=weights), weights)
                          for i, b in ((0, None), (100, None), (100, 64)))
    assert bool((small < start).all())
    assert bool((small <= 1.2 * full).all())
    assert torch.equal(kmeans(points, 8, batch=200), kmeans(points, 8))  # a batch of everything is Lloyd's algorithm


@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 5))
def test_any_number_of_words(count: int, dim: int, seed: int) -> None:
    points = cloud(2, count, dim, seed)
    exact = kmeans(points, count, seed=seed)
    assert exact.shape == (2, count, dim)
    assert float(objective(points, exact).max()) <= count * (8 * EPS * 4) ** 2 * dim  # a word a point


def test_it_is_deterministic_and_leaves_its_input_and_the_global_generator_alone() -> None:
    points = cloud(2, 80, 3)
    kept, state = points.clone(), torch.random.get_rng_state()
    assert torch.equal(kmeans(points, 9, init="kmeans++"), kmeans(points, 9, init="kmeans++"))
    assert torch.equal(points, kept)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("change", "message"), [
    ({"words": 41}, "41 clusters of 40 points"), ({"words": 0}, "clusters"), ({"words": 2.0}, "clusters"),
    ({"iterations": -1}, "iterations"), ({"init": "best"}, "init"), ({"batch": 0}, "batch"),
    ({"engine": "gpu"}, "engine"),
    ({"points": torch.zeros(4, 4)}, "shape"), ({"points": torch.zeros(1, 0, 4)}, "0 points"),
])
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"points": cloud(1, 40, 2), "words": 4, **change}
    with pytest.raises(CodecConfigError, match=message):
        kmeans(**arguments)  # type: ignore[arg-type]


def test_faiss_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(CodecConfigError, match="pip install faiss-cpu"):
        kmeans(cloud(1, 40, 2), 4, engine="faiss")
    with pytest.raises(CodecConfigError, match="no weights"):
        kmeans(cloud(1, 40, 2), 4, engine="faiss", weights=torch.ones(1, 40, 1))


def test_faiss_agrees() -> None:
    pytest.importorskip("faiss")
    points = cloud(2, 400, 2)
    ours, theirs = (objective(points, kmeans(points, 8, engine=engine)) for engine in ("torch", "faiss"))
    assert bool((theirs <= 1.15 * ours).all())


@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1.0, 3e38])
def test_powers_of_two_are_exact(scale: float) -> None:
    values = gaussian((3, 5)).clamp(-1, 1) * scale
    exponent = exponent_of(values)
    unit = times_power(values, -exponent)
    assert 0.5 <= float(unit.abs().max()) < 1
    assert torch.equal(times_power(unit, exponent), values)
    assert exponent_of(torch.zeros(2)) == 0
