"""What is made of a tensor is made once while it is needed, and never of another one."""

import weakref

import torch

from tersor.numerics import settings
from tersor.numerics.remembered import Memory, remembered, remembering


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def twice(self, given: torch.Tensor) -> torch.Tensor:
        def make() -> torch.Tensor:
            self.calls += 1
            return 2 * given
        return remembered(given, "twice", make)


def test_made_once_within_and_every_time_without() -> None:
    count, given = Counted(), torch.ones(2)
    with remembering():
        first = count.twice(given)
        with remembering():
            assert count.twice(given) is first
        assert count.twice(first).tolist() == [4.0, 4.0]  # of what was made of it
        assert count.twice(given) is first
    assert count.calls == 2
    count.twice(given)
    count.twice(given)
    assert count.calls == 4


def test_another_tensor_takes_its_place_and_memory_is_let_go_of() -> None:
    count, memory, given = Counted(), Memory(), torch.ones(2)
    with remembering(memory):
        held = weakref.ref(count.twice(given))
    assert held() is not None
    with remembering(memory):
        count.twice(torch.zeros(2))
        assert held() is None
        count.twice(given)
    assert count.calls == 3


def test_equal_keys_of_other_tensors_and_what_was_written_to_are_told_apart() -> None:
    count, given = Counted(), torch.ones(2)
    with remembering():
        count.twice(given)
        given.mul_(3)
        assert count.twice(given).tolist() == [6.0, 6.0]
        assert remembered(given, "thrice", lambda: 3 * given).tolist() == [9.0, 9.0]
    with torch.inference_mode():
        uncounted = torch.ones(2)  # torch does not count what is written to it
    with remembering(), torch.inference_mode():
        count.twice(uncounted)
        uncounted.mul_(3)
        assert count.twice(uncounted).tolist() == [6.0, 6.0]


def test_what_was_made_under_changing_settings_is_forgotten() -> None:
    count, given, rounds = Counted(), torch.ones(2), []

    def work() -> torch.Tensor:
        rounds.append(count.calls)
        if len(rounds) == 1:
            torch.set_float32_matmul_precision("high")  # as another thread may
        return count.twice(given)

    with remembering():
        before = torch.get_float32_matmul_precision()
        try:
            settings.steadily(work)
        finally:
            torch.set_float32_matmul_precision(before)
    assert rounds == [0, 1]
    assert count.calls == 2
