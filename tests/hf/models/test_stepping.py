"""How the arguments of a step follow from those of the step before: learned from two, proved by a third."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.hf.models.stepping import DeclinedError, Fed

ROOM, FIRST = 6, 2
HELD = object()  # a cache


def token(step: int) -> Tensor:
    return torch.tensor([[7 + step], [40 - step]])


def mask(step: int, *, closed: float | bool, opened: float | bool) -> Tensor:
    """Return what the token of a step sees, (2, 1, 1, ROOM); the second sequence has one place of padding."""
    found = torch.where(torch.arange(ROOM) <= FIRST + step, opened, closed).repeat(2, 1, 1, 1)
    found[1, ..., 0] = closed
    return found


def given(step: int, **more: Any) -> dict[str, Any]:
    """Return what a step is called with, whose token stands at FIRST + step."""
    masks = {"full": mask(step, closed=False, opened=True), "added": mask(step, closed=-1e9, opened=0.0)}
    return {"input_ids": token(step), "positions": torch.tensor([[FIRST + step], [FIRST + step - 1]]), "cache": HELD,
            "masks": masks, "kept": torch.arange(3), "use_cache": True, "nothing": None, **more}


def taught() -> Fed:
    fed = Fed(given(0))
    fed.take(given(0))
    fed.learn(given(1), FIRST + 1)
    fed.take(given(1))
    return fed


def test_arguments_follow_in_place() -> None:
    fed = taught()
    held = fed.arguments
    places = {name: one.data_ptr() for name, one in held.items() if isinstance(one, Tensor)}
    for step in (2, 3):
        fed.follow(torch.tensor([FIRST + step]))
        fed.verify(given(step))
        wanted = given(step)
        assert torch.equal(held["positions"], wanted["positions"])
        assert all(torch.equal(held["masks"][name], wanted["masks"][name]) for name in ("full", "added"))
        assert held["cache"] is HELD
        assert torch.equal(held["kept"], torch.arange(3))
        assert torch.equal(fed.token, token(1))  # for others to write
    fed.follow(torch.tensor([ROOM]))  # after the last step there is no such place
    assert bool(held["masks"]["full"][0].all())
    assert places == {name: one.data_ptr() for name, one in held.items() if isinstance(one, Tensor)}
    fed.take(given(0))
    assert torch.equal(held["masks"]["added"], given(0)["masks"]["added"])
    assert torch.equal(fed.token, token(0))


def wrong(step: int) -> list[Tensor]:
    """Return tensors that follow in ways that are not known."""
    shaded = mask(step, closed=False, opened=True)
    if step:
        shaded[1, ..., 1] = False  # closes another place
    uneven = mask(step, closed=0.0, opened=1.0)
    uneven[0, ..., FIRST + step] += step  # opens by two numbers
    return [torch.tensor([[2 * step]]), torch.tensor([0.5 + step]), shaded, uneven, torch.arange(4) * step]


@pytest.mark.parametrize("which", range(5))
def test_other_ways_are_refused(which: int) -> None:
    fed = Fed(given(0, odd=wrong(0)[which]))
    with pytest.raises(DeclinedError, match="'odd' changes from token to token"):
        fed.learn(given(1, odd=wrong(1)[which]), FIRST + 1)


def test_what_the_third_step_does_not_show_is_refused() -> None:
    """A number that grows by one, and then by two."""
    fed = Fed(given(0, odd=torch.tensor([1])))
    fed.learn(given(1, odd=torch.tensor([2])), FIRST + 1)
    fed.take(given(1, odd=torch.tensor([2])))
    fed.follow(torch.tensor([FIRST + 2]))
    with pytest.raises(DeclinedError, match="'odd' changes"):
        fed.verify(given(2, odd=torch.tensor([4])))


@pytest.mark.parametrize(("more", "reason"), [
    ({"another": 1}, r"not all called with \['another'\]"), ({"use_cache": False}, "'use_cache' is not of the same"),
    ({"cache": object()}, "'cache' is not"), ({"kept": torch.arange(4)}, "'kept' is not"), ({"kept": None}, "'kept'"),
    ({"positions": torch.zeros(2, 1)}, "'positions' is not"), ({"use_cache": 1}, "'use_cache' is not")])
def test_steps_of_another_kind_are_refused(more: dict[str, Any], reason: str) -> None:
    fed = taught()
    with pytest.raises(DeclinedError, match=reason):
        fed.take(given(2, **more))


@pytest.mark.parametrize("ids", [None, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 1)])
def test_a_step_reads_one_token(ids: Tensor | None) -> None:
    with pytest.raises(DeclinedError, match="one token of each sequence"):
        Fed(given(0, input_ids=ids))
