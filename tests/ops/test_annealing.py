"""Annealing's draws: their probabilities, and on CUDA the kernel against plain torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.anneal import minimize
from tersor.codecs import TwoBasis
from tersor.codecs.two_basis import start_of
from tersor.ops import annealing
from tersor.ops.annealing import reference
from tersor.ops.annealing.problem import Schedule, pick, unit_of
from tersor.testing import gaussian

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


def run(sample: object, codec: TwoBasis, target: Tensor, sweeps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes and the mean squared error of each vector, after minimization."""
    bases, start = codec.bases(target.shape[1]), start_of(codec)
    s, t = sample(target, bases, Schedule(sweeps, start.hot, start.cold), seed)  # type: ignore[operator]
    s, t = minimize(target, bases, t)
    first, second = (levels.to(target.device) for levels in (bases.first, bases.second))
    rest = target - first[s.int()] - bases.spread(second[t.int()] * bases.kept.to(target.device))
    return s, t, rest.square().mean(1)


def test_the_reference_draws_from_its_seed_alone() -> None:
    target, codec = gaussian((4, 64), 1), TwoBasis()
    torch.manual_seed(7)
    first = run(reference.sample, codec, target, 5, 3)
    torch.manual_seed(8)
    assert torch.equal(first[0], run(annealing.sample, codec, target, 5, 3)[0])
    assert not torch.equal(first[0], run(reference.sample, codec, target, 5, 4)[0])


@pytest.mark.parametrize("codec", [TwoBasis(), TwoBasis(half=True), TwoBasis(3, 2), TwoBasis(4, 2), TwoBasis(8, 2)],
                         ids=str)
@pytest.mark.parametrize("width", [256, 1024, 4096])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_agrees_with_plain_torch(codec: TwoBasis, width: int) -> None:
    """In distortion, on 64 vectors: the mean difference within 4 of its spreads, which is below 1 %."""
    from tersor.ops.annealing import triton

    target = gaussian((64, width), 1).cuda()
    ours, plain = (run(sample, codec, target, 100, 0)[2].double().cpu() for sample in (triton.sample, reference.sample))
    difference = (ours - plain) / plain.mean()
    spread = float(difference.std()) / 64**0.5
    assert abs(float(difference.mean())) <= 4 * spread
    assert spread < 0.015


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_on_one_device_is_reproducible() -> None:
    target, codec = gaussian((64, 1024), 2).cuda(), TwoBasis()
    first, second, other = (run(annealing.sample, codec, target, 51, seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("text", ["two2x2", "two3x2m", "two2x2ho"])
def test_codec_on_a_device(text: str) -> None:
    """Encoded there, decoded here and there: the same error as encoded here, within the seeds' spread."""
    from tersor.codec import Encoded
    from tersor.quality import measure
    from tersor.registry import parse

    codec, matrix = parse(text), gaussian((256, 256), 3)
    there = codec.encode(matrix.cuda(), options={"sweeps": 50})
    here = codec.encode(matrix, options={"sweeps": 50})
    assert all(t.is_cuda for t in there.tensors.values())
    moved = Encoded(codec, there.shape, {name: t.cpu() for name, t in there.tensors.items()})
    torch.testing.assert_close(there.decode().cpu(), moved.decode(), rtol=0, atol=1e-4)
    assert measure(matrix, moved).relative_error == pytest.approx(measure(matrix, here).relative_error, rel=0.03)
    x = gaussian((5, 256), 4).cuda()
    torch.testing.assert_close(there.matmul(x), x @ there.decode().T, rtol=1e-3, atol=1e-2)
