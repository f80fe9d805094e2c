"""Which calls of torch's attention become one operation, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from tersor.compiling.attention import ONE, join_attention
from tersor.testing import gaussian

PLACES, SIZE = 40, 16


class Joining:
    """A backend that runs the graph as `join_attention` leaves it, and remembers."""

    def __init__(self) -> None:
        self.taken, self.keys = 0, [()]

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        del inputs
        self.taken = join_attention(graph)
        self.keys = [tuple(node.args[1].meta["example_value"].shape) for node in graph.graph.nodes
                     if node.target == ONE.default]
        return graph.forward


def drawn(batch: int, heads: int, tokens: int, seed: int) -> Tensor:
    return gaussian((batch * heads * tokens, SIZE), seed).view(batch, heads, tokens, SIZE)


def repeated(x: Tensor, times: int) -> Tensor:
    """Return keys for all heads, as transformers writes it."""
    batch, groups, places, size = x.shape
    return x[:, :, None, :, :].expand(batch, groups, times, places, size).reshape(batch, groups * times, places, size)


def masks(*shape: int) -> Tensor:
    """Return a mask in which the first and last places are hidden."""
    seen = torch.arange(PLACES) % (PLACES - 3) > 4
    return seen.expand(*shape[:-1], PLACES)[..., :shape[-1]]


CASES = [(1, 1, masks(1, 1, 1, PLACES), 1), (3, 1, masks(1, 1, 1, PLACES), 1), (3, 1, masks(3, 1, 1, PLACES), 1),
         (3, 1, masks(3, 4, 1, PLACES), 0), (3, 1, masks(1, 1, 1, PLACES).float(), 0),
         (1, 2, masks(1, 1, 2, PLACES), 0), (2, 2, masks(2, 1, 2, PLACES), 0)]


@pytest.mark.parametrize(("batch", "tokens", "mask", "taken"), CASES)
def test_what_is_replaced(batch: int, tokens: int, mask: Tensor, taken: int) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, repeated(key, 2), repeated(value, 2), attn_mask=mask, scale=0.3)

    given = (drawn(batch, 4, tokens, 1), drawn(batch, 2, PLACES, 2), drawn(batch, 2, PLACES, 3), mask)
    joining = Joining()
    found = torch.compile(function, backend=joining, dynamic=False)(*given)
    assert joining.taken == taken
    assert joining.keys == [(batch, 2, PLACES, SIZE)] * taken  # not repeated
    torch.testing.assert_close(found, function(*given), rtol=0, atol=1e-6)


def test_keys_of_another_batch_are_left_to_torch() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    given = (drawn(3, 2, 1, 1), drawn(1, 2, PLACES, 2), drawn(1, 2, PLACES, 3), masks(1, 1, 1, PLACES))
    joining = Joining()
    torch.testing.assert_close(torch.compile(function, backend=joining, dynamic=False)(*given), function(*given))
    assert joining.taken == 0
