"""Annealing's draws: their probabilities, and on CUDA the kernel against plain torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs import TwoBasis
from tersor.codecs.bases.anneal import minimize
from tersor.codecs.bases.two_basis import start_of
from tersor.numerics import rng
from tersor.ops import annealing
from tersor.ops.annealing import reference
from tersor.ops.annealing.problem import Draws, Schedule, pick, unit_of
from tersor.ops.annealing.shapes import factors, tile_of
from tersor.testing import gaussian, tolerance
from tests.ops.devices import GPU

DRAWS = 200_000


@pytest.mark.parametrize("levels", [(-0.6, 0.6), (-0.9, 0.0, 0.9), (-1.25, -0.3, 0.3, 1.25)])
@pytest.mark.parametrize("rest", [-1.1, 0.0, 0.2, 0.7])
@pytest.mark.parametrize("temperature", [0.05, 0.4])
def test_draws_follow_the_softmax(levels: tuple[float, ...], rest: float, temperature: float) -> None:
    """Pearson's statistic of k classes has mean k - 1 and variance 2 (k - 1); it may exceed the mean by 4 spreads."""
    alphabet = torch.tensor(levels)
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1))
    drawn = pick(torch.full((DRAWS,), rest), alphabet, temperature, uniform)
    weights = np.exp(-((rest - np.array(levels)) ** 2) / (2 * temperature))
    expected = DRAWS * weights / weights.sum()
    counts = np.array([int((drawn == level).sum()) for level in alphabet])
    assert counts.sum() == DRAWS
    likely = expected >= 10  # the statistic's law holds for classes that are not rare; rare ones are pooled below
    degrees = max(1, int(likely.sum()) - 1)
    statistic = float(((counts - expected) ** 2 / expected)[likely].sum())
    assert statistic <= degrees + 4 * math.sqrt(2 * degrees)
    rare = float(expected[~likely].sum())
    assert counts[~likely].sum() <= rare + 4 * math.sqrt(rare) + 1


@pytest.mark.parametrize(("levels", "uniform"), [((-0.6, 0.6), 0.0), ((-0.6, 0.6), 1 - 2**-24),
                                                 ((-0.9, 0.0, 0.9), 2**-24), ((-0.9, 0.0, 0.9), 1 - 2**-24)])
def test_extreme_odds_neither_overflow_nor_surprise(levels: tuple[float, ...], uniform: float) -> None:
    drawn = pick(torch.tensor([50.0, -50.0]), torch.tensor(levels), 1e-3, torch.full((2,), uniform))
    assert drawn.tolist() == pytest.approx([levels[-1], levels[0]])


def test_cold_draws_are_the_nearest_levels() -> None:
    alphabet, rest = torch.tensor([-1.25, -0.3, 0.3, 1.25]), gaussian((1, 500), 3).flatten()
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(2))
    nearest = alphabet[(rest.unsqueeze(-1) - alphabet).abs().argmin(-1)]
    assert torch.equal(pick(rest, alphabet, 1e-9, uniform), nearest)


def test_the_unit_of_temperature() -> None:
    assert unit_of(torch.tensor([-1.0, -0.25, 0.25, 1.0])) == 0.0625


def run(sample: object, codec: TwoBasis, target: Tensor, sweeps: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes and the mean squared error of each vector, after minimization."""
    bases, start = codec.bases(target.shape[1]), start_of(codec)
    t = sample(target, bases, Schedule(sweeps, start.hot, start.cold), draws)  # type: ignore[operator]
    s, t = minimize(target, bases, t)
    first, second = (levels.to(target.device) for levels in (bases.first, bases.second))
    rest = target - first[s.int()] - bases.spread(second[t.int()] * bases.kept.to(target.device))
    return s, t, rest.square().mean(1)


def test_the_reference_draws_from_its_seed_alone() -> None:
    target, codec = gaussian((4, 64), 1), TwoBasis()
    torch.manual_seed(7)
    first = run(reference.sample, codec, target, 5, Draws(3))
    torch.manual_seed(8)
    assert torch.equal(first[0], run(annealing.sample, codec, target, 5, Draws(3))[0])
    assert not torch.equal(first[0], run(reference.sample, codec, target, 5, Draws(4))[0])


def test_draws() -> None:
    """The kernel counts vectors of the matrix; a generator gets one number, as before there was a kernel."""
    assert Draws(5, 30, 4).vector == 34
    assert Draws(5, 30, 4).mixed == 5 + 7919 * 30 + 4


@pytest.mark.parametrize(("width", "tile"), [
    (64, (4, 16)), (192, (12, 16)), (256, (16, 16)), (512, (32, 16)), (576, (36, 16)), (1024, (32, 32)),
    (1408, (44, 32)), (4096, (64, 64)), (8192, (128, 64)), (14336, (112, 128)), (11008, None), (49152, None),
    (32768, None), (48, None), (100, None), (32, None), (1031, None)])
def test_widths_that_the_kernel_takes(width: int, tile: tuple[int, int] | None) -> None:
    found = tile_of(width)
    assert (found and (found.rows, found.columns)) == tile
    assert not annealing.fused(torch.zeros(1, width))  # on a processor never


@pytest.mark.parametrize("width", [64, 192, 256, 576, 752, 832, 1408, 1536, 2048])
def test_factors_are_the_rotation(width: int) -> None:
    """`P = (A ⊗ H) signs`, to the rounding of half precision, 2^-11 of each factor's entries, in the norm."""
    tile, rotation = tile_of(width), TwoBasis(seed=4).bases(width).rotation
    assert tile is not None
    left, back, right = (matrix.float() for matrix in factors(rotation, tile, torch.device("cpu")))
    assert torch.equal(back, left.T)
    assert not bool(left[tile.rows :].any())
    assert not bool(left[:, tile.rows :].any())
    x = gaussian((3, width), 2)
    square = (x * rng.signs(rotation.seed, 0, width)).reshape(3, tile.rows, tile.columns)
    tall = torch.nn.functional.pad(square, (0, 0, 0, tile.padded - tile.rows))
    expected = rotation.forward(x)
    found = (left @ tall @ right)[:, : tile.rows].reshape(3, width)
    assert float((found - expected).norm()) <= 2 * 2**-11 * float(expected.norm())


@pytest.mark.parametrize("codec", [TwoBasis(), TwoBasis(half=True), TwoBasis(3, 2), TwoBasis(4, 2), TwoBasis(8, 2)],
                         ids=str)
@pytest.mark.parametrize("width", [64, 256, 1024, 1408, 4096, 8192])
@GPU
def test_the_kernel_agrees_with_plain_torch(codec: TwoBasis, width: int) -> None:
    """In distortion, on 2^16 numbers or 64 vectors: the mean difference within 4 of its spreads, which is small."""
    from tersor.ops.annealing import launch

    count = max(64, 2**16 // width)
    target = gaussian((count, width), 1).cuda()
    ours, plain = (run(sample, codec, target, 100, Draws(0))[2].double().cpu()
                   for sample in (launch.sample, reference.sample))
    difference = (ours - plain) / plain.mean()
    spread = float(difference.std()) / count**0.5
    assert abs(float(difference.mean())) <= 4 * spread
    assert spread < 0.015


@pytest.mark.parametrize("width", [128, 192, 384, 512, 576, 752, 768, 832, 1536, 2816, 5632, 14336, 16384])
@GPU
def test_the_kernel_at_other_widths(width: int) -> None:
    """Paley and seeded orthogonal factors, padded rows, the largest tiles: as above, at 2 bits."""
    from tersor.ops.annealing import launch

    count, codec = max(64, 2**16 // width), TwoBasis(seed=1)
    target = gaussian((count, width), 1).cuda()
    ours, plain = (run(sample, codec, target, 60, Draws(0))[2].double().cpu()
                   for sample in (launch.sample, reference.sample))
    difference = (ours - plain) / plain.mean()
    assert abs(float(difference.mean())) <= 4 * float(difference.std()) / count**0.5


@GPU
def test_the_kernel_on_one_device_is_reproducible() -> None:
    target, codec = gaussian((64, 1024), 2).cuda(), TwoBasis()
    first, second, other = (run(annealing.sample, codec, target, 51, Draws(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


@GPU
def test_a_vector_does_not_depend_on_those_beside_it() -> None:
    """Only on the seed and its place in the matrix: equal vectors at other places, or seeds apart, share nothing."""
    target, codec = gaussian((1, 1024), 2).cuda().repeat(8, 1), TwoBasis()
    bases, plan = codec.bases(1024), Schedule(40, 0.25, 0.1)
    whole = annealing.sample(target, bases, plan, Draws(7))
    part = annealing.sample(target[3:5], bases, plan, Draws(7, 2, 1))
    assert torch.equal(part, whole[3:5])
    assert len(torch.unique(whole, dim=0)) == 8
    later = annealing.sample(target, bases, plan, Draws(8))
    assert len(torch.unique(torch.cat([whole, later]), dim=0)) == 16


@GPU
def test_the_kernel_ends_at_a_minimum() -> None:
    """The four exact rounds that follow it leave next to nothing to thirty more: 1e-4 of the error."""
    target, codec = gaussian((64, 1408), 3).cuda(), TwoBasis(4, 2)
    bases, plan = codec.bases(1408), Schedule(100, 0.28, 0.12)
    reached = []
    for rounds in (4, 34):
        s, t = minimize(target, bases, annealing.sample(target, bases, plan, Draws(1)), rounds)
        rest = target - bases.first.cuda()[s.int()] - bases.spread(bases.second.cuda()[t.int()])
        reached.append(float(rest.square().mean()))
    assert reached[1] <= reached[0] <= reached[1] * (1 + 1e-4)


@GPU
@pytest.mark.parametrize("shape", [(256, 256), (96, 1408), (96, 100)])
@pytest.mark.parametrize("text", ["two2x2", "two3x2m", "two2x2ho"])
def test_codec_on_a_device(text: str, shape: tuple[int, int]) -> None:
    """Encoded there, decoded here and there: the same error as encoded here, within the seeds' spread.

    Products: the kernel rounds the numbers of both rotated vectors to fp16, each by at most 2^-11 of it. The errors are
    independent, times levels of at most `peak`, so their sum's spread is at most `2^-11 √2 peak |x|`; by Hoeffding's
    inequality one of 2 e^18 exceeds six of those. Sums of float32 are two of `width` terms, of vectors of norms `|x|`
    and at most `peak √width`, hence `tolerance`.
    """
    from tersor.contract.codec import Encoded
    from tersor.quality import measure
    from tersor.registry import parse

    codec, matrix = parse(text), gaussian(shape, 3)
    there = codec.encode(matrix.cuda(), options={"sweeps": 50})
    here = codec.encode(matrix, options={"sweeps": 50})
    assert all(t.is_cuda for t in there.tensors.values())
    moved = Encoded(codec, there.shape, {name: t.cpu() for name, t in there.tensors.items()})
    torch.testing.assert_close(there.decode().cpu(), moved.decode(), rtol=0, atol=1e-4)
    assert measure(matrix, moved).relative_error == pytest.approx(measure(matrix, here).relative_error, rel=0.03)
    x = gaussian((5, shape[1]), 4)
    error = (there.matmul(x.cuda()).cpu().double() - x.double() @ moved.decode().double().T).abs()
    held = {name: moved.tensors[name].double() for name in ("levels", "scales")}
    scale = held["scales"] if held["scales"].shape == error.shape[1:] else held["scales"].max()  # of a row
    width = max(shape)  # along outputs: in float32, rotated after the sums
    rounding = 6 * 2**-11 * 2**0.5 + 2 * tolerance(torch.float32, width) * width**0.5
    assert bool((error <= rounding * scale * held["levels"].max() * x.double().norm(dim=1, keepdim=True)).all())
