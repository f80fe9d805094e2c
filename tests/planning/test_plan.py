"""The planner: exact against brute force, never above the budget, and its JSON."""

import itertools
import json
import random

import pytest

from tersor.errors import BudgetError, CodecConfigError, UnknownCodecError
from tersor.planning import plan
from tersor.planning.plan import Choice
from tersor.registry import parse

CODEC = parse("lm3")


def random_choices(rng: random.Random, matrices: int, rungs: int, unit: int = 1) -> dict[str, list[Choice]]:
    return {f"m{i}": [Choice(CODEC, unit * rng.randint(1, 40) + 50 * unit * r, rng.random() * 4.0**-r)
                      for r in range(rungs)] for i in range(matrices)}


def cost(picks: dict[str, Choice]) -> tuple[int, float]:
    return sum(c.nbytes for c in picks.values()), sum(c.distortion for c in picks.values())


@pytest.mark.parametrize("seed", range(30))
def test_spending_equals_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    choices = random_choices(rng, 4, 4)
    budget = sum(min(c.nbytes for c in options) for options in choices.values()) + rng.randint(0, 300)
    nbytes, distortion = cost(plan.spend(choices, budget))
    every = [(sum(c.nbytes for c in combo), sum(c.distortion for c in combo))
             for combo in itertools.product(*choices.values())]
    best = min(d for n, d in every if n <= budget)
    assert nbytes <= budget
    assert distortion == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("limit", [0, 400])
def test_large_budgets_stay_below_and_close(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "EXACT_LIMIT", limit)  # 0: the hull
    choices = random_choices(random.Random(1), 120, 8, unit=997)
    least = sum(min(c.nbytes for c in options) for options in choices.values())
    budget = int(1.7 * least)
    nbytes, _ = cost(plan.spend(choices, budget))
    assert 0.995 * budget <= nbytes <= budget


def test_hull_is_within_one_step_of_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = random_choices(random.Random(2), 60, 6)
    budget = 60 * 120
    _, exact = cost(plan.spend(choices, budget))
    monkeypatch.setattr(plan, "EXACT_LIMIT", 0)
    _, hull = cost(plan.spend(choices, budget))
    largest_step = max(c.distortion for options in choices.values() for c in options)
    assert exact <= hull + 1e-12 <= exact + largest_step


def test_budget_below_the_least_names_it() -> None:
    choices = {"a": [Choice(CODEC, 100, 1.0)], "b": [Choice(CODEC, 50, 1.0), Choice(CODEC, 70, 0.5)]}
    with pytest.raises(BudgetError, match="150") as caught:
        plan.spend(choices, 149)
    assert caught.value.least_bytes == 150
    assert cost(plan.spend(choices, 150))[0] == 150


def test_frontier_drops_beaten_choices() -> None:
    good, beaten, dear = Choice(CODEC, 10, 1.0), Choice(CODEC, 12, 1.5), Choice(CODEC, 20, 0.5)
    assert plan.frontier([dear, beaten, good]) == [good, dear]


def test_plan_survives_json() -> None:
    picks = {"a": parse("rot,lm3"), "b": parse("rows3(lm3;lm2)")}
    assert plan.from_json(json.loads(json.dumps(plan.to_json(picks)))) == picks


@pytest.mark.parametrize(("record", "error"), [([], CodecConfigError), ({"a": 3}, CodecConfigError),
                                               ({"a": "nonsense9"}, UnknownCodecError)])
def test_bad_plans_are_refused(record: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        plan.from_json(record)


@pytest.mark.parametrize("weights", [{"x": 1.0}, {"a": -1.0}, {"a": float("nan")}, {"a": "1"}])
def test_bad_sensitivities_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(CodecConfigError, match="sensitivit"):
        plan.check_weights(["a"], weights)


def test_weights_are_tempered_an_element() -> None:
    """Ratios an element become their roots, the sum stays; equal ones and none at all are as they were."""
    found = plan.tempered({"a": 8.0, "b": 4.0, "c": 0.0}, {"a": 2, "b": 16, "c": 5})
    assert found["c"] == 0.0
    assert sum(found.values()) == pytest.approx(12.0)
    assert (found["a"] / 2) / (found["b"] / 16) == pytest.approx((4.0 / 0.25) ** plan.TEMPER)
    even = plan.tempered({"a": 1.0, "b": 8.0}, {"a": 2, "b": 16})
    assert even == pytest.approx({"a": 1.0, "b": 8.0})
    assert plan.tempered({"a": 0.0}, {"a": 3}) == {"a": 0.0}
