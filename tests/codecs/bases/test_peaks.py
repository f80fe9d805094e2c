"""Codebooks of decompositions: closed-form starts, Lloyd iterations, the best of several starts."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersor.codecs.bases.peaks import Fit, distortion, pairs, sign_sums
from tersor.codecs.bases.splitting import Basis, greedy
from tersor.numerics.lloyd import lloyd
from tersor.testing import gaussian


def test_sign_sums_are_all_sums_with_signs() -> None:
    leading = torch.tensor([[[0.8, 0.0], [0.0, 0.5], [0.3, 0.0], [9.0, 0.0]]])
    expected = {(a * 0.8 + c * 0.3, b * 0.5) for a, b, c in itertools.product((-1, 1), repeat=3)}
    found = {tuple(round(float(value), 6) for value in row) for row in sign_sums(leading, 8)[0]}
    assert found == {tuple(round(value, 6) for value in row) for row in expected}
    assert sign_sums(leading, 5).shape == (1, 5, 2)
    alone = sign_sums(torch.tensor([[[0.1], [0.0], [0.4]]]), 4)  # the longest two
    assert sorted(round(float(value), 6) for value in alone.flatten()) == [-0.5, -0.3, 0.3, 0.5]


def test_lloyd_never_raises_the_distortion() -> None:
    points = gaussian((3, 400), 1).reshape(3, 200, 2)
    centroids, before = points[:, :7].clone(), None
    for _ in range(12):
        cost = distortion(points, centroids)
        assert before is None or bool((cost <= before * (1 + 1e-6)).all())
        before, centroids = cost, lloyd(points, centroids, 1)
    assert torch.equal(lloyd(points, points[:, :7].clone(), 0), points[:, :7])


def test_lloyd_is_the_mean_of_the_nearest() -> None:
    points, start = gaussian((2, 80), 2).reshape(2, 40, 2), gaussian((2, 6), 3).reshape(2, 3, 2)
    start[0, 2] = 100.0  # loses all points and stays
    found = lloyd(points, start, 1)
    for book in range(2):
        chosen = torch.cdist(points[book], start[book]).argmin(1)
        for word in range(3):
            own = points[book][chosen == word]
            expected = own.mean(0) if len(own) else start[book, word]
            assert torch.allclose(found[book, word], expected, atol=1e-5)


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_the_closed_form_finds_the_peaks(levels: int) -> None:
    """On Gaussian vectors it is as good as the best of many random starts, without any Lloyd iteration within 3 %."""
    x = gaussian((4, 2048), 1)
    split = greedy(x, Basis("hadamard", 2048, 0))
    points = torch.stack([split.first, split.second], -1)
    many = Fit(levels, False, restarts=12, closed_form=False)
    known = Fit(levels, False, rounds=20, restarts=0)
    costs = [distortion(points, fit.books(points, split.leading).float()) for fit in (many, known)]
    assert bool((costs[1] <= 1.01 * costs[0]).all())
    start = distortion(points, sign_sums(split.leading, levels))
    assert bool((start <= 1.03 * costs[1]).all())


def test_more_starts_are_never_worse() -> None:
    points, nothing = gaussian((2, 800), 4).reshape(2, 400, 2), torch.zeros(2, 8, 2)
    costs = [distortion(points, Fit(9, False, restarts=n).books(points, nothing).float()) for n in (1, 3, 6)]
    assert bool((costs[1] <= costs[0] * 1.001).all())  # fp16
    assert bool((costs[2] <= costs[1] * 1.001).all())


def test_separate_codebooks_are_products() -> None:
    points = gaussian((2, 600), 5).reshape(2, 300, 2)
    book = Fit(9, True).books(points, torch.zeros(2, 8, 2))
    assert book.shape == (2, 2, 3)
    table = pairs(book, separate=True)
    assert table.shape == (2, 9, 2)
    for i, j in itertools.product(range(3), repeat=2):
        assert table[1, 3 * i + j].tolist() == [float(book[1, 0, i]), float(book[1, 1, j])]
    joint = Fit(9, False).books(points, torch.zeros(2, 8, 2))
    assert torch.equal(pairs(joint, separate=False), joint.float())


def test_fewer_points_than_words() -> None:
    points = torch.tensor([[[1.0, 0.5], [-1.0, 0.25]]])
    book = Fit(16, False).books(points, torch.zeros(1, 8, 2))
    assert book.shape == (1, 16, 2)
    assert float(distortion(points, book.float())) == 0
