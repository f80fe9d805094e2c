"""Attention of few queries over dense sinks, closed tokens as codes, and dense recent tokens. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tersor.ops.dispatch import compiled_allowed, take_reference
from tersor.ops.kv_attention import reference
from tersor.ops.kv_attention.shapes import LANE_BITS, Closed, Held, How, Levels, Side, refusal

if TYPE_CHECKING:
    from tersor.ops.kv_attention.lanes import Part


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


def part_of(side: Side, shape: tuple[int, int, int], room: int, span: tuple[int, int]) -> Part | None:
    """Return blocks of a side for kernels of the processor, None where they do not know such; numba is missed once.

    Parameters
    ----------
    shape : (int, int, int)
        Heads, numbers of a head, tokens of a block.
    room : int
        Blocks of a page.
    span : (int, int)
        First block, and the last but one.
    """
    heads, dim, block = shape
    levels = side.levels
    whole = levels.bits in LANE_BITS and dim % 8 == 0 and (levels.maps is None or levels.maps.shape[1] == dim)
    if not whole or not compiled_allowed("kv_attention"):
        return None
    from tersor.ops.kv_attention.lanes import Part

    return Part(side, heads, dim, block, room, *span)


__all__ = ["Closed", "Held", "How", "Levels", "Side", "kv_attention", "part_of", "takes_kernel"]
