"""What is made for a GPU stays; other results are held in number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersor.numerics.constants import MOST, constant, kept


@pytest.mark.parametrize("cached", [kept, constant])
def test_what_a_captured_graph_may_read_is_never_made_anew(cached: Callable[..., Callable[..., Tensor]]) -> None:
    made: list[int] = []

    @cached
    def numbers(count: int, device: torch.device) -> Tensor:
        made.append(count)
        return torch.zeros(count)  # on no device: it is the argument that counts

    far, near = torch.device("cuda", 0), torch.device("cpu")
    first = numbers(0, far)
    for count in range(1, 2 * MOST):
        numbers(count, far)
    assert numbers(0, far) is first
    assert made == list(range(2 * MOST))
    again = numbers(0, near)
    assert numbers(0, near) is again
    for count in range(1, 2 * MOST):
        numbers(count, near)
    assert numbers(0, near) is not again
