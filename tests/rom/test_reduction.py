"""Identities of reduced order models: float64, against slow and obvious references, to rounding."""

import pytest
import torch
from torch import Tensor

from tersor.errors import CodecConfigError, NonFiniteError
from tersor.rom.linear import Moments, Reduced, Sums, Target, reduce, regression
from tersor.testing import tolerance

EXACT = 1e-10  # relative, in float64: eigenvalues of squared matrices lose half the digits of the smallest ones
SHAPES = [(12, 20, 200), (20, 12, 200), (16, 16, 100), (12, 20, 9), (20, 12, 7), (16, 24, 12)]  # out, in, tokens


def case(shape: tuple[int, int, int], offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return W (out, in) and tokens (tokens, in) of falling variances, turned, with a mean."""
    out, width, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(draw(width, width)).Q
    x = draw(tokens, width) * torch.logspace(0, -1, width, dtype=torch.float64) @ turn
    return draw(out, width), x + offset * draw(width)


def error(weight: Tensor, x: Tensor, found: Tensor, bias: Tensor | None = None,
          original: Tensor | None = None) -> float:
    """Mean squared error a token of outputs, measured."""
    gap = (x if original is None else original) @ weight.T - x @ found.T
    return float((gap if bias is None else gap - bias).square().sum() / len(x))


def product(reduced: Reduced, rank: int) -> Tensor:
    left, right = reduced.factors(rank)
    return left @ right.T


def eckart_young(outputs: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(outputs)[rank:].square().sum() / len(outputs))


def ranks_of(shape: tuple[int, int, int]) -> range:
    return range(1, min(shape), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_uncentred_rom_is_whitened_svd_is_eckart_young(shape: tuple[int, int, int]) -> None:
    weight, x = case(shape, 1.0)
    reduced = reduce(weight, Moments.of(x), Target("outputs"))
    total = float((x @ weight.T).square().sum() / len(x))
    for rank in ranks_of(shape):
        best = eckart_young(x @ weight.T, rank)
        found = product(reduced, rank)
        assert torch.linalg.matrix_rank(found) == rank
        assert abs(error(weight, x, found) - best) <= EXACT * total
        assert abs(float(reduced.errors[rank]) - best) <= EXACT * total
        if len(x) > shape[1]:  # Cholesky needs a Gram matrix that is not singular
            root = torch.linalg.cholesky(x.T @ x)
            u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
            whitened = torch.linalg.solve_triangular(root, (u[:, :rank] * s[:rank]) @ v[:rank], upper=False, left=False)
            assert float((found - whitened).norm()) <= EXACT * float(weight.norm())


def test_a_singular_gram_defeats_cholesky_only() -> None:
    weight, x = case((12, 20, 9))
    assert int(torch.linalg.cholesky_ex(x.T @ x).info)
    assert len(reduce(weight, Moments.of(x), Target("outputs")).energies) == 9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 0.5, 4.0])
def test_a_bias_is_worth_at_most_one_rank(shape: tuple[int, int, int], offset: float) -> None:
    weight, x = case(shape, offset)
    moments = Moments.of(x)
    plain = reduce(weight, moments, Target("outputs"))
    centred = reduce(weight, moments, Target("outputs", centred=True, bias=True))
    slack = EXACT * float(plain.errors[0])
    for rank in ranks_of(shape):
        found = product(centred, rank)
        measured = error(weight, x, found, centred.bias(found))
        assert abs(measured - float(centred.errors[min(rank, len(centred.energies))])) <= slack
        upper, lower = (float(plain.errors[min(r, len(plain.energies))]) for r in (rank, rank + 1))
        assert lower - slack <= measured <= upper + slack


def test_the_released_defects() -> None:
    """Centred without a bias is worse the further the mean lies from 0, and SFSD's released bias is identically 0."""
    shape, rank, ratios = (16, 24, 400), 6, []
    for offset in (0.5, 1.0, 2.0, 4.0):
        weight, x = case(shape, offset)
        moments = Moments.of(x)
        released = reduce(weight, moments, Target("outputs", centred=True))
        found, y = product(released, rank), x @ weight.T
        assert released.bias(found) is None
        mean, basis = y.mean(0), released.left[:, :rank]
        missed = float((mean - basis @ (basis.T @ mean)).square().sum())
        measured = error(weight, x, found)
        assert measured == pytest.approx(float(released.errors[rank]) + missed, rel=EXACT)
        ratios.append(measured / eckart_young(y, rank))
        whole = torch.linalg.eigh(torch.cov(y.T)).eigenvectors
        sfsd = mean - whole @ (whole.T @ mean) + basis @ (basis.T @ (y - mean).mean(0))
        assert float(sfsd.norm()) <= 1e-12 * float(mean.norm())
    assert ratios == sorted(ratios)
    assert ratios[0] >= 1.0
    assert ratios[-1] > 3.0


def test_a_bias_is_the_best_one() -> None:
    weight, x = case((8, 12, 100), 1.0)
    reduced = reduce(weight, Moments.of(x), Target("outputs", centred=True, bias=True))
    found = product(reduced, 3)
    bias = reduced.bias(found)
    assert bias is not None
    best = error(weight, x, found, bias)
    for component in range(8):
        for by in (-1e-3, 1e-3):
            moved = bias.clone()
            moved[component] += by
            assert error(weight, x, found, moved) > best


@pytest.mark.parametrize("shape", [(12, 20, 200), (20, 12, 200)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_anchored_is_ridge_regression_of_reduced_rank(shape: tuple[int, int, int], ridge: float) -> None:
    """With the ridge as further tokens whose outputs are those of W: least squares, then the best rank of the fit."""
    weight, original = case(shape, 1.0)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = original + 0.3 * noise
    reduced = reduce(weight, Moments.of(x, original), Target("anchored", ridge=ridge))
    size = (ridge * len(x) * float(x.square().sum(0).mean() / len(x))) ** 0.5
    more = size * torch.eye(shape[1], dtype=torch.float64)
    inputs, outputs = torch.cat([x, more]), torch.cat([original @ weight.T, more @ weight.T])
    fit = torch.linalg.lstsq(inputs, outputs).solution
    fitted = inputs @ fit
    assert float((reduced.full - fit.T).norm()) <= EXACT * float(fit.norm())
    for rank in (1, 4, 9):
        v = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
        expected = (fit @ v.T @ v).T
        assert float((product(reduced, rank) - expected).norm()) <= 1e-8 * float(expected.norm())


def test_anchored_without_a_shift_is_the_shifted_target_with_a_ridge() -> None:
    weight, x = case((12, 20, 200), 1.0)
    same = reduce(weight, Moments.of(x, x), Target("anchored", ridge=0.1))
    moments = Moments.of(x)
    ridge = 0.1 * moments.second.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    damped = Moments(moments.second + ridge, moments.mean, moments.size, moments.count)
    expected = reduce(weight, damped, Target("outputs"))
    assert float((same.full - weight).norm()) <= EXACT * float(weight.norm())
    assert float((product(same, 5) - product(expected, 5)).norm()) <= EXACT * float(weight.norm())


def test_anchored_beats_shifted_on_what_the_original_gave() -> None:
    weight, original = case((12, 20, 400), 1.0)
    x = original @ torch.diag(torch.linspace(1.0, 0.3, 20, dtype=torch.float64)) + 0.5
    for rank in (2, 6, 12):
        found = {kind: reduce(weight, Moments.of(x, original), Target(kind, centred=True, bias=True, ridge=0.0))
                 for kind in ("outputs", "anchored")}
        errors = {kind: error(weight, x, product(one, rank), one.bias(product(one, rank)), original)
                  for kind, one in found.items()}
        assert errors["anchored"] < errors["outputs"]
    anchored = Target("anchored", centred=True, bias=True, ridge=0.0)
    full, bias = regression(weight, Moments.of(x, original), anchored, biased=True)
    assert error(weight, x, full, bias, original) <= 1e-9 * float((original @ weight.T).square().mean())


@pytest.mark.parametrize("shape", [(12, 20, 200), (20, 12, 200), (16, 16, 300)])
def test_curvature_is_the_best_under_it(shape: tuple[int, int, int]) -> None:
    weight, x = case(shape, 1.0)
    mixing = torch.randn(shape[0], shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    curvature = mixing @ mixing.T
    damped = curvature + 1e-3 * curvature.diagonal().mean() * torch.eye(shape[0], dtype=torch.float64)
    root = torch.linalg.cholesky(damped)
    reduced = reduce(weight, Moments.of(x), Target("outputs"), curvature)
    plain = reduce(weight, Moments.of(x), Target("outputs"))
    assert float((reduced.left.norm(dim=0) - 1.0).abs().max()) <= EXACT
    for rank in (1, 4, 9):
        best = eckart_young(x @ weight.T @ root, rank)
        found = error(root.T @ weight, x, root.T @ product(reduced, rank))
        assert abs(found - best) <= EXACT * float(reduced.errors[0])
        assert found < error(root.T @ weight, x, root.T @ product(plain, rank))


def test_weights_and_diagonal_need_no_more_than_they_say() -> None:
    weight, x = case((12, 20, 200), 1.0)
    moments = Moments.of(x)
    scale = x.abs().mean(0) ** 0.5
    for kind, metric in (("weights", torch.ones(20, dtype=torch.float64)), ("diagonal", scale)):
        u, s, v = torch.linalg.svd(weight * metric, full_matrices=False)
        expected = (u[:, :5] * s[:5]) @ v[:5] / metric
        found = product(reduce(weight, moments, Target(kind)), 5)
        assert float((found - expected).norm()) <= EXACT * float(weight.norm())


def test_ranks_beyond_what_was_seen_are_zeros() -> None:
    weight, x = case((12, 20, 4))
    reduced = reduce(weight, Moments.of(x), Target("outputs"))
    left, right = reduced.factors(7)
    assert left.shape == (12, 7)
    assert right.shape == (20, 7)
    assert not bool(left[:, 4:].any() | right[:, 4:].any())
    assert error(weight, x, left @ right.T) <= EXACT
    silent = reduce(weight, Moments.of(torch.zeros(5, 20)), Target("outputs"))
    assert bool(torch.isfinite(product(silent, 2)).all())


def test_sums_stream_and_leave_padding_out() -> None:
    _, x = case((8, 12, 96), 1.0)
    rows = x.to(torch.float32).reshape(8, 12, 12)
    original = rows * 0.5 + 1.0
    mask = torch.ones(8, 12)
    mask[:, :5] = 0
    sums = Sums(12, cross=True)
    for part in range(0, 8, 3):
        sums.add(rows[part : part + 3], original[part : part + 3], mask[part : part + 3])
    found = sums.moments()
    expected = Moments.of(rows[:, 5:].reshape(-1, 12), original[:, 5:].reshape(-1, 12))
    assert found.count == expected.count == 56
    bound = tolerance(torch.float32, 56)
    assert found.cross is not None
    assert expected.cross is not None
    assert found.original is not None
    for one, other in ((found.second, expected.second), (found.cross, expected.cross), (found.mean, expected.mean),
                       (found.size, expected.size), (found.original, expected.original)):
        assert float((one - other).norm()) <= bound * float(other.norm())
    assert torch.equal(found.second, found.second.T)


def test_bad_numbers_and_words_are_refused() -> None:
    sums = Sums(3)
    sums.add(torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(NonFiniteError, match="layer 7"):
        sums.moments("layer 7")
    with pytest.raises(CodecConfigError, match="target"):
        Target("nothing")
    with pytest.raises(CodecConfigError, match="ridge"):
        Target(ridge=-1.0)
