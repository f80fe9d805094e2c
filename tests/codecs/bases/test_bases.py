"""Second bases are orthogonal at every width that they take; decompositions keep the facts of the Kashin papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.bases.splitting import KINDS, MAX_DENSE, Basis, Kronecker, clipping, greedy, haar
from tersor.errors import CodecConfigError
from tersor.testing import gaussian, outliers, student_t3, tolerance

WIDTHS = {"hadamard": (1, 2, 3, 64, 70, 97, 768), "dct": (1, 2, 3, 64, 70, 97, 521), "butterfly": (2, 64, 70, 768),
          "dense": (1, 2, 3, 64, 97, 300)}
PLACES = [(kind, width) for kind in KINDS for width in WIDTHS[kind]]
STEP = math.sqrt(2 / math.pi)  # mean magnitude of a unit normal: the length of the first step
FALL = math.sqrt(1 - 2 / math.pi)  # of the residual's norm, and so of the length, a step


def dense(kind: str, width: int, seed: int = 3) -> Tensor:
    return Basis(kind, width, seed).forward(torch.eye(width)).T


@pytest.mark.parametrize(("kind", "width"), PLACES)
def test_orthogonal(kind: str, width: int) -> None:
    basis, matrix = Basis(kind, width, 3), dense(kind, width).double()
    bound = tolerance(torch.float32, width) * width**0.5
    assert float((matrix @ matrix.T - torch.eye(width)).norm()) <= bound
    x = gaussian((2 * 3, width)).reshape(2, 3, width)
    assert float((basis.forward(x) - x.double() @ matrix.T).norm()) <= bound * float(x.norm())
    assert float((basis.inverse(x) - x.double() @ matrix).norm()) <= bound * float(x.norm())
    assert float((basis.inverse(basis.forward(x)) - x).norm()) <= bound * float(x.norm())
    assert basis.forward(x[:0]).shape == (0, 3, width)
    if kind in ("hadamard", "dct"):
        assert float((matrix - matrix.T).norm()) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_give_other_bases(kind: str) -> None:
    assert float((dense(kind, 64, 0) - dense(kind, 64, 1)).norm()) > 4
    assert torch.equal(dense(kind, 64, 0), dense(kind, 64, 0))


@pytest.mark.parametrize(("kind", "width"), [(kind, width) for kind in KINDS for width in (64, 70, 768)
                                             if (kind, width) != ("hadamard", 70)])  # 35 has no Hadamard matrix
def test_every_unit_vector_is_spread(kind: str, width: int) -> None:
    """A random unit vector of n numbers peaks at about √(2 log n / n); none of a good basis comes near one number."""
    peak = dense(kind, width).abs().amax(0)
    assert float(peak.max()) <= 2.5 * math.sqrt(2 * math.log(width) / width)


def test_dense_is_uniform() -> None:
    """Diagonal and all entries are like normal numbers of variance 1/n, in mean magnitude and in size of the peak."""
    matrix = haar(256, 1)
    spread = 4 * math.sqrt(1 - 2 / math.pi) / 16  # four standard errors of 256 magnitudes
    assert abs(16 * np.abs(np.diag(matrix)).mean() - STEP) <= spread
    assert abs(16 * np.abs(matrix[0]).mean() - STEP) <= spread
    assert 16 * np.abs(matrix).max() <= 6


@pytest.mark.parametrize(("kind", "width", "others"), [
    ("hadamard", 521, "'dct', 'dense'"), ("hadamard", 50257, "'dct'"), ("butterfly", 97, "'hadamard', 'dct', 'dense'"),
    ("dense", MAX_DENSE + 256, "'hadamard', 'dct', 'butterfly'")])
def test_widths_that_it_cannot_take(kind: str, width: int, others: str) -> None:
    with pytest.raises(CodecConfigError, match=f"width {width}: .*; at this width these can: {others}$"):
        Basis(kind, width, 0)


def test_unknown_kind() -> None:
    with pytest.raises(CodecConfigError, match="transform must be one of"):
        Basis("householder", 8, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_kronecker(kind: str) -> None:
    both = Kronecker(Basis(kind, 6, 1), Basis(kind, 10, 2))
    matrix = torch.kron(dense(kind, 6, 1), dense(kind, 10, 2)).double()
    x = gaussian((3, 60))
    bound = tolerance(torch.float32, 60) * float(x.norm())
    assert float((both.forward(x) - x.double() @ matrix.T).norm()) <= bound
    assert float((both.inverse(x) - x.double() @ matrix).norm()) <= bound


def reference(x: np.ndarray, matrix: np.ndarray, *, fixed: bool, steps: int) -> tuple[np.ndarray, np.ndarray, list]:
    """The algorithm as it is written, on one vector in float64; also |r|₁² / n of every step and |r|² after it."""
    u, v, fell = np.zeros_like(x), np.zeros_like(x), []
    for step in range(steps):
        turned = matrix @ x
        if (step % 4 < 2) if fixed else np.abs(x).sum() > np.abs(turned).sum():
            y = np.sign(x)
            part = x @ y / (y @ y) * y
            u, x = u + part, x - part
        else:
            y = np.sign(turned)
            part = turned @ y / (y @ y) * y
            v, x = v + part, x - matrix.T @ part
        fell.append((part @ part, x @ x))
    return u, v, fell


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [False, True])
def test_greedy_is_the_reference(kind: str, fixed: bool) -> None:
    vectors = torch.cat([gaussian((3, 96)), student_t3((3, 96)), outliers((2, 96))])
    basis, steps = Basis(kind, 96, 3), 9  # later, elements of the residual are as small as its rounding
    left, _, right = np.linalg.svd(dense(kind, 96).double().numpy())
    matrix = left @ right  # without the rounding to float32
    found = greedy(vectors, basis, fixed=fixed, iterations=steps, tolerance=1e-12)
    assert found.steps.tolist() == [steps] * len(vectors)
    bound = steps * tolerance(torch.float32, 96)
    for i, vector in enumerate(vectors.double().numpy()):
        u, v, fell = reference(vector, matrix, fixed=fixed, steps=steps)
        size = np.linalg.norm(vector)
        assert np.linalg.norm(found.first[i].double().numpy() - u) <= bound * size
        assert np.linalg.norm(found.second[i].double().numpy() - v) <= bound * size
        assert abs(float(found.residual[i]) - math.sqrt(fell[-1][1]) / size) <= bound
        before = vector @ vector
        for part, after in fell:  # the squared residual falls by |r|₁² / n
            assert before - after == pytest.approx(part, rel=1e-9, abs=1e-12 * size**2)
            before = after


@pytest.mark.parametrize("fixed", [False, True])
def test_each_step_lowers_the_energy_by_the_squared_mean_magnitude(fixed: bool) -> None:
    x, basis = gaussian((4, 512), 5), Basis("hadamard", 512, 0)
    size = x.norm(dim=1)
    for step in range(8):
        before, after = (greedy(x, basis, fixed=fixed, iterations=n, tolerance=1e-12) for n in (step, step + 1))
        length = after.leading[:, step].sum(1)  # |r|₁ / n; the other part's is 0
        fell = (before.residual.square() - after.residual.square()) * size.square()
        assert torch.allclose(fell, 512 * length.square(), rtol=1e-2, atol=1e-5 * float(size.max()) ** 2)
        assert (after.leading[:, step] > 0).sum(1).tolist() == [1] * 4


@pytest.mark.parametrize("kind", ["hadamard", "dct", "butterfly", "dense"])
def test_steps_on_gaussian_vectors(kind: str) -> None:
    """10 steps to 1e-2 and 30 to 1e-6; the theory, a fall by .603 a step, says 9.1 and 27.3."""
    width = 512 if kind == "dense" else 4096
    x, basis = gaussian((8, width), 2), Basis(kind, width, 0)
    assert 10 <= int(greedy(x, basis, tolerance=1e-2).steps.max()) <= 11
    fine = greedy(x, basis, tolerance=1e-6)
    assert 28 <= int(fine.steps.min()) <= int(fine.steps.max()) <= 32
    assert float(fine.residual.max()) <= 1e-6
    frame = fine.first + basis.inverse(fine.second)
    assert float((frame - x).norm()) <= (1e-6 + tolerance(torch.float32, width)) * float(x.norm())


@pytest.mark.parametrize("make", [student_t3, outliers])
def test_steps_on_heavy_tails(make: object) -> None:
    x = make((8, 4096), 2)  # type: ignore[operator]
    for kind in ("hadamard", "dct"):
        assert 28 <= int(greedy(x, Basis(kind, 4096, 0)).steps.max()) <= 34


def test_peaks_are_bounded() -> None:
    """Lengths fall by .603, so that steps u, u, v, v add up to 1.474 in u and .536 in v; adaptive ones to no more."""
    x, basis = gaussian((16, 4096), 1), Basis("hadamard", 4096, 0)
    scale = x.square().mean(1, keepdim=True).sqrt()
    u = STEP * (1 + FALL) / (1 - FALL**4)
    found = greedy(x / scale, basis, fixed=True)
    assert found.first.abs().amax(1) == pytest.approx(torch.full((16,), u), rel=0.03)
    assert found.second.abs().amax(1) == pytest.approx(torch.full((16,), u * FALL**2), rel=0.06)
    found = greedy(x / scale, basis)
    assert float(torch.maximum(found.first.abs().max(), found.second.abs().max())) <= 1.03 * u < 0.5 * float(x.max())


def test_four_clean_peaks_on_gaussian_vectors() -> None:
    """Near ±c₁ ± c₂ within what all later steps in u add, .195: four groups, with nothing between them."""
    x, basis = gaussian((16, 4096), 4), Basis("dct", 4096, 0)
    u = greedy(x / x.square().mean(1, keepdim=True).sqrt(), basis, fixed=True).first
    later = STEP * FALL**4 * (1 + FALL) / (1 - FALL**4)
    outer, inner = STEP * (1 + FALL), STEP * (1 - FALL)
    assert outer - inner > 2 * later + 0.3
    assert inner > later + 0.1
    slack = 0.03  # the lengths of a vector's first steps differ from their means by 1 / √4096 each
    far, near = ((u.abs() - peak).abs() <= later + slack for peak in (outer, inner))
    assert bool((far | near).all())
    share = math.erfc(STEP / math.sqrt(2))  # beyond the first length, both steps have the same sign
    assert float(far.float().mean()) == pytest.approx(share, abs=4 * 0.5 / math.sqrt(u.numel()) + 0.005)
    assert float((u > 0).float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(u.numel()))


@pytest.mark.parametrize(("eta", "delta"), [(0.9, 1.0), (0.9, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("make", [gaussian, student_t3, outliers])
def test_clipping_keeps_its_bound(make: object, eta: float, delta: float) -> None:
    """Frame coefficients √2 u and √2 v within K |x| / √(2n), K = 1 / ((1 - eta) √delta).

    At eta .9 the frame is exact; at .5 the level falls faster than the residual of vectors with heavy tails.
    """
    x, basis = make((8, 1024), 3), Basis("hadamard", 1024, 1)  # type: ignore[operator]
    found = clipping(x, basis, eta=eta, delta=delta, iterations=150)
    most = x.norm(dim=1) / ((1 - eta) * math.sqrt(delta * 2 * 1024))
    assert bool((2**0.5 * torch.maximum(found.first, found.second).abs().amax(1) <= (1 + 1e-5) * most).all())
    exact = eta == 0.9 or make is gaussian
    assert (float(found.residual.max()) <= 1e-6) == exact
    frame = found.first + basis.inverse(found.second)
    left = found.residual + 1e-6 + tolerance(torch.float32, 1024)
    assert bool(((frame - x).norm(dim=1) <= left * x.norm(dim=1)).all())
    assert not bool(found.leading.any())


@pytest.mark.parametrize("split", [greedy, clipping])
def test_stopped_early_it_tells_the_residual(split: object) -> None:
    x, basis = student_t3((4, 256)), Basis("dct", 256, 0)
    found = split(x, basis, iterations=2)  # type: ignore[operator]
    left = (x - found.first - basis.inverse(found.second)).norm(dim=1) / x.norm(dim=1)
    assert torch.allclose(found.residual, left, atol=1e-5)
    assert float(found.residual.min()) > 1e-6
    assert found.steps.tolist() == [2] * 4


@pytest.mark.parametrize("split", [greedy, clipping])
def test_zero_and_constant_vectors(split: object) -> None:
    x, basis = torch.stack([torch.zeros(64), torch.full((64,), 2.0), gaussian((1, 64))[0]]), Basis("dct", 64, 0)
    kept = x.clone()
    found = split(x, basis)  # type: ignore[operator]
    assert torch.equal(x, kept)
    assert not bool(found.first[0].any() or found.second[0].any())
    assert found.steps[0] == 0
    assert found.residual[0] == 0
    if split is greedy:
        assert torch.equal(found.first[1], x[1])
        assert found.steps[1] == 1
