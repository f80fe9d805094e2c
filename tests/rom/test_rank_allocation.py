"""Ranks under a budget: optimal where that can be checked by trying everything, and landing where they should."""

import itertools

import numpy as np
import pytest

from tersor.errors import BudgetError, CodecConfigError
from tersor.rom.ranks import ALLOCATIONS, STORAGES, Linear, blocks_reduced, parameters, ranks_for, total_cost
from tests.covering import covering


def linear(shape: tuple[int, int], block: int, seed: int, decay: float = 1.0, extra: int = 0) -> Linear:
    generator = np.random.default_rng(seed)
    energies = np.sort(generator.exponential(size=min(shape)) * np.arange(1, min(shape) + 1) ** -decay)[::-1]
    errors = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]])
    return Linear(shape, block, errors, extra)


def model(blocks: int = 8) -> list[Linear]:
    shapes = [(96, 96), (32, 96), (96, 96), (256, 96), (96, 256)]
    return [linear(shape, block, 10 * block + i, 0.5 + i / 4, 96 * (i == 0))
            for block in range(blocks) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.7, 0.9])
def test_water_is_optimal(storage: str, keep: float) -> None:
    """Against every combination of ranks, dense linears among them."""
    for seed in range(6):
        linears = [linear((5, 7), 0, seed), linear((8, 4), 0, seed + 50, 2.0), linear((6, 6), 1, seed + 90, 0.0)]
        budget = int(keep * sum(one.dense for one in linears))
        tried = [[*range(1, one.most(storage) + 1), None] for one in linears]
        allowed = [ranks for ranks in itertools.product(*tried) if total_cost(linears, ranks, storage) <= budget]
        if not allowed:
            with pytest.raises(BudgetError):
                ranks_for(linears, keep, "water", storage)
            continue
        best = min(sum(one.error(rank) for one, rank in zip(linears, ranks, strict=True)) for ranks in allowed)
        found = ranks_for(linears, keep, "water", storage)
        assert total_cost(linears, found, storage) <= budget
        error = sum(one.error(rank) for one, rank in zip(linears, found, strict=True))
        assert error == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("keep", covering([0.8, 0.5], [0.9, 0.8, 0.6, 0.5, 0.3]))
def test_every_allocation_lands_within_half_a_per_cent(allocation: str, storage: str, keep: float) -> None:
    linears = model()
    ranks = ranks_for(linears, keep, allocation, storage)
    spent = total_cost(linears, ranks, storage) / sum(one.dense for one in linears)
    assert keep - 0.005 <= spent <= keep
    for one, rank in zip(linears, ranks, strict=True):
        assert rank is None or (1 <= rank <= min(one.shape) and one.cost(rank, storage) < one.dense)


def test_water_beats_the_others_at_equal_parameters() -> None:
    linears = model()
    errors = {allocation: sum(one.error(rank) for one, rank in zip(
        linears, ranks_for(linears, 0.6, allocation, "pair"), strict=True)) for allocation in ALLOCATIONS}
    assert errors["water"] < min(errors["uniform"], errors["last"])
    gauge = ranks_for(linears, 0.6, "water", "gauge")
    assert sum(one.error(rank) for one, rank in zip(linears, gauge, strict=True)) < errors["water"]


def test_the_published_budgets() -> None:
    """LLaMA-7B: 8, 12 and 24 of 32 modules; module budgets .60, .46, .33; ranks as printed (954 misprints 942)."""
    assert [blocks_reduced(keep, 32) for keep in (0.9, 0.8, 0.5)] == [8, 12, 24]
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    nothing = np.zeros(2)
    linears = [Linear(shape, block, nothing) for block in range(32) for shape in shapes]
    for keep, attention, forward, count in ((0.9, 1228, 1791, 8), (0.8, 942, 1373, 12), (0.5, 675, 985, 24)):
        ranks = ranks_for(linears, keep, "last", "pair")
        assert all(rank is None for rank in ranks[: -7 * count])
        assert None not in ranks[-7 * count :]
        budget = 1 - (1 - keep) * 32 / count  # .60, .467, .333: so that the preset lands where it was asked to
        published = {0.9: 0.60, 0.8: 0.46, 0.5: 0.33}[keep]
        assert ranks[-1] == pytest.approx(forward * budget / published, abs=2)
        assert ranks[-7] == pytest.approx(attention * budget / published, abs=2)


def test_numbers_of_a_rank() -> None:
    assert parameters((4096, 4096), 1024, "pair") == 1024 * 8192
    assert parameters((4096, 4096), 1024, "gauge") == 1024 * (8192 - 1024) + 4096 / 16
    for keep in (0.8, 0.5, 0.2):  # r / d = 1 - sqrt(1 - keep)
        most = max(r for r in range(1, 1000) if parameters((1000, 1000), r, "gauge") <= keep * 10**6)
        assert most == pytest.approx(1000 * (1 - (1 - keep) ** 0.5), abs=2)


def test_all_kept_is_all_dense() -> None:
    assert ranks_for(model(), 1.0, "water", "gauge") == [None] * 40


def test_bad_budgets_are_refused() -> None:
    for keep in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(BudgetError, match="above 0 and at most 1"):
            ranks_for(model(), keep, "uniform", "pair")
    with pytest.raises(BudgetError, match="rank 1 everywhere"):
        ranks_for(model(), 0.001, "water", "pair")
    with pytest.raises(CodecConfigError, match="below break-even"):
        ranks_for([Linear((1, 9), 0, np.zeros(2)), Linear((7, 1), 0, np.zeros(2))], 0.5, "uniform", "pair")
    with pytest.raises(CodecConfigError, match="allocation"):
        ranks_for(model(), 0.5, "best", "pair")
