"""Attention of few queries over dense sinks, closed tokens as codes, and dense recent tokens. See README.md."""

from __future__ import annotations

from torch import Tensor

from tersor.ops.dispatch import take_reference
from tersor.ops.kv_attention import reference
from tersor.ops.kv_attention.shapes import Closed, Held, How, Levels, Side, refusal


def kv_attention(query: Tensor, held: Held, how: How, counts: Tensor | None = None) -> Tensor:
    """Return attention (batch, query heads, queries, dim) in the dtype of `query`.

    Parameters
    ----------
    query : Tensor
        (batch, query heads, queries, dim), a multiple of the heads held.
    held : Held
    how : How
    counts : Tensor or None
        int32 (3,), on the device: closed tokens, sinks and recent tokens, where they are to be read there. `held` then
        says how many there may be; a captured graph serves a cache that grows up to that. Kernels only.
    """
    if takes_kernel(query, held):
        from tersor.ops.kv_attention import launch

        return launch.attention(query, held, how, counts)
    assert counts is None
    return reference.attention(query, held, how).to(query.dtype)


def takes_kernel(query: Tensor, held: Held) -> bool:
    """Tell whether this runs as a kernel; where it could but for its shapes, says why not, once."""
    return query.is_cuda and not take_reference("kv_attention", refusal(query, held), query.device)


__all__ = ["Closed", "Held", "How", "Levels", "Side", "kv_attention", "takes_kernel"]
