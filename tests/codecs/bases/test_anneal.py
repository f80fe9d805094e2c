"""Annealing two-basis codes: against exhaustive search and a slow Gibbs sampler, and what minimization promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs import TwoBasis
from tersor.codecs.bases.anneal import anneal, fit_levels, minimize, standard_levels
from tersor.codecs.bases.two_basis import schedule_of, start_of
from tersor.contract.codec import Search
from tersor.numerics.rotation import Rotation
from tersor.ops.annealing.problem import Bases, Schedule
from tersor.testing import gaussian

ALPHABETS = [TwoBasis(), TwoBasis(half=True), TwoBasis(3, 2), TwoBasis(4, 2), TwoBasis(3, 3)]


def errors(target: Tensor, bases: Bases, s: Tensor, t: Tensor) -> Tensor:
    """Return the squared error of each vector, float64."""
    second = bases.second[t.int()] * bases.kept
    return (target - bases.first[s.int()] - bases.spread(second)).double().square().sum(1)


def schedule(codec: TwoBasis, sweeps: int) -> Schedule:
    return schedule_of(codec, Search(options={"sweeps": sweeps}))


def gibbs(target: Tensor, bases: Bases, plan: Schedule, seed: int) -> tuple[Tensor, Tensor]:
    """Anneal one coordinate at a time, from the definition: `exp(-error² / 2T)` by all levels of that coordinate."""
    generator = np.random.default_rng(seed)
    y, p = target.double().numpy(), bases.rotation.forward(torch.eye(target.shape[1])).T.double().numpy()
    alphabets = [bases.first.double().numpy(), bases.second.double().numpy()]
    unit = (np.diff(alphabets[1]).min() / 2) ** 2
    chosen = [generator.integers(len(a), size=y.shape) for a in alphabets]
    vectors, width = y.shape
    for sweep in range(plan.sweeps):
        temperature = unit * plan.start * (plan.stop / plan.start) ** (sweep / max(1, plan.sweeps - 1))
        for i, basis, j in itertools.product(range(vectors), range(2), range(width)):
            values = [alphabets[b][chosen[b][i]] for b in range(2)]
            rest = y[i] - values[0] - p.T @ values[1]
            direction = np.eye(width)[j] if basis == 0 else p[j]
            moved = rest + (values[basis][j] - alphabets[basis])[:, None] * direction
            odds = np.exp(-((moved**2).sum(1) - (moved**2).sum(1).min()) / (2 * temperature))
            chosen[basis][i, j] = generator.choice(len(odds), p=odds / odds.sum())
    return minimize(target, bases, torch.from_numpy(chosen[1]).to(torch.uint8))


def test_the_slow_sampler_agrees() -> None:
    """The means of both over seeds differ by less than 4 spreads of their difference, which is itself small."""
    codec, target = TwoBasis(), gaussian((3, 16), 6)
    bases, plan = codec.bases(16), schedule(codec, 25)
    slow, fast = ([float(errors(target, bases, *method(target, bases, plan, seed)).mean()) for seed in range(runs)]
                  for method, runs in ((gibbs, 8), (anneal, 40)))
    spread = (np.var(slow) / len(slow) + np.var(fast) / len(fast)) ** 0.5
    assert abs(np.mean(slow) - np.mean(fast)) <= 4 * spread
    assert spread <= 0.03 * np.mean(fast)


def test_close_to_the_exhaustive_optimum() -> None:
    """8 elements in two bases: all 65,536 sums of signs."""
    codec, target = TwoBasis(), gaussian((64, 8), 1)
    bases = codec.bases(8)
    signs = torch.tensor(list(itertools.product((0, 1), repeat=8)))
    first, second = bases.first[signs], bases.spread(bases.second[signs])
    sums = (first.unsqueeze(1) + second).reshape(-1, 8)
    best = torch.cdist(target, sums, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.double().square()
    runs, short = (torch.stack([errors(target, bases, *anneal(target, bases, schedule(codec, sweeps), seed))
                                for seed in range(8)]) for sweeps in (1000, 1))
    assert bool((runs >= best * (1 - 1e-5)).all())
    assert float(runs.mean()) <= 1.1 * float(best.mean())
    assert float(runs.amin(0).mean()) <= 1.02 * float(best.mean())  # the best of the runs
    assert float(short.mean()) > 1.1 * float(best.mean())


@pytest.mark.parametrize("codec", ALPHABETS, ids=str)
def test_minimization_never_raises_the_error(codec: TwoBasis) -> None:
    target, bases = gaussian((20, 96), 2), codec.bases(96)
    generator = torch.Generator().manual_seed(3)
    s = torch.randint(codec.first, target.shape, generator=generator)
    t = torch.randint(codec.second, target.shape, generator=generator)
    after = errors(target, bases, *minimize(target, bases, t))
    assert bool((after <= errors(target, bases, s, t)).all())
    again = errors(target, bases, *minimize(target, bases, minimize(target, bases, t)[1]))
    assert bool((again <= after * (1 + 1e-6)).all())


@pytest.mark.parametrize("codec", ALPHABETS, ids=str)
def test_no_single_change_helps(codec: TwoBasis) -> None:
    width = 24
    target, bases = gaussian((6, width), 4), codec.bases(width)
    s, t = minimize(target, bases, torch.zeros(6, width, dtype=torch.uint8))
    reached = errors(target, bases, s, t)
    for place, j in itertools.product(range(2), range(width)):
        for code in range((codec.first, codec.second)[place]):
            changed = [s.clone(), t.clone()]
            changed[place][:, j] = code
            assert bool((errors(target, bases, changed[0], changed[1]) >= reached * (1 - 1e-6)).all())


@pytest.mark.parametrize("codec", ALPHABETS, ids=str)
def test_levels_are_the_least_squares_ones(codec: TwoBasis) -> None:
    """Against a dense solve in float64 with a column for each pair of opposite levels."""
    target, bases = gaussian((7, 40), 5), codec.bases(40)
    s, t = anneal(target, bases, schedule(codec, 5), 0)
    p = bases.rotation.forward(torch.eye(40)).T.double()
    columns = []
    for count, chosen, back in ((codec.first, s, torch.eye(40).double()), (codec.second, t, bases.kept[:, None] * p)):
        for k in range((count + 1) // 2, count):
            signs = (chosen == k).double() - (chosen == count - 1 - k).double()
            columns.append((signs @ back).flatten())
    solved = torch.linalg.lstsq(torch.stack(columns, 1), target.double().flatten()[:, None]).solution.flatten()
    first, second = fit_levels(target, bases, s, t)
    pairs = codec.first // 2
    for levels, half, count in ((first, solved[:pairs], codec.first), (second, solved[pairs:], codec.second)):
        expected = torch.cat([-half.flip(0), torch.zeros(count % 2, dtype=torch.float64), half])
        torch.testing.assert_close(levels.double(), expected, rtol=1e-5, atol=1e-6)
    fitted = Bases(first, second, bases.rotation, bases.kept)
    assert float(errors(target, fitted, s, t).sum()) <= float(errors(target, bases, s, t).sum())


def test_unused_levels_leave_the_codes_their_meaning() -> None:
    """Where no element uses the outer pair its least-squares level is 0; the inner pair must stay the inner pair."""
    target, bases = torch.tensor([[0.3, -0.3, 0.3, 0.3]]), TwoBasis(4, 2, half=True).bases(4)
    s = torch.tensor([[2, 1, 2, 2]], dtype=torch.uint8)
    bases = Bases(bases.first, bases.second, bases.rotation, torch.zeros(4, dtype=torch.bool))
    first, _ = fit_levels(target, bases, s, torch.zeros_like(s))
    torch.testing.assert_close(first[s.int()], target)


def test_blocks_of_vectors_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor vectors are annealed in blocks, each from its own seed: codes differ, errors hardly."""
    codec, target = TwoBasis(), gaussian((32, 64), 7)
    bases = codec.bases(64)
    whole = errors(target, bases, *anneal(target, bases, schedule(codec, 50), 0))
    monkeypatch.setattr("tersor.codecs.bases.anneal.BLOCK_FLOATS", 5 * 64)
    parts = errors(target, bases, *anneal(target, bases, schedule(codec, 50), 0))
    difference = (whole - parts) / whole.mean()
    assert abs(float(difference.mean())) <= 4 * float(difference.std()) / 32**0.5
    assert not torch.equal(whole, parts)


def test_starting_alphabets() -> None:
    for codec in (*ALPHABETS, TwoBasis(5, 3), TwoBasis(16, 16)):
        bases = codec.bases(8)
        for levels, count in ((bases.first, codec.first), (bases.second, codec.second)):
            assert levels.shape == (count,)
            assert bool((levels[1:] > levels[:-1]).all())
            torch.testing.assert_close(levels, -levels.flip(0))
        assert start_of(codec).hot > start_of(codec).cold > 0
    torch.testing.assert_close(standard_levels(4, 5.0), torch.tensor([-3.0, -1.0, 1.0, 3.0]))


def test_temperatures_fall_geometrically() -> None:
    plan = Schedule(5, 0.4, 0.025)
    expected = [2 * 0.4 * 0.5**k for k in range(5)]
    assert [plan.temperature(k, 2.0) for k in range(5)] == pytest.approx(expected)
    assert Schedule(1, 0.4, 0.025).temperature(0, 1.0) == 0.4
    assert Rotation(8, 1) == TwoBasis().bases(8).rotation
