"""Attention of few queries over dense sinks, closed tokens as codes, and dense recent tokens. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tersor.ops.dispatch import compiled_allowed, take_reference
from tersor.ops.kv_attention import reference
from tersor.ops.kv_attention.octets import Octets
from tersor.ops.kv_attention.shapes import (
    LANE_BITS,
    SIGN_MOST,
    SIGN_TOKENS,
    SIGN_WORD,
    Closed,
    Held,
    How,
    Levels,
    Side,
    lie_as_octets,
    lie_as_signs,
    refusal,
)
from tersor.ops.kv_attention.signs import Filter, Lying
from tersor.ops.kv_attention.spelling import Book, Spelled, shelf_of

if TYPE_CHECKING:
    from tersor.ops.kv_attention.lanes import Part
    from tersor.ops.kv_attention.worded import Worded
    from tersor.payload.words import Words


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
        says how many there may be; a captured graph serves a cache that grows up to that. Without kernels this waits
        for the device, unless there are no closed tokens.
    """
    if held.closed is not None and takes_kernel(query, held):
        from tersor.ops.kv_attention import launch

        return launch.attention(query, held, how, counts)
    if counts is not None:
        held, how = reference.counted(held, how, counts)
    return reference.attention(query, held, how).to(query.dtype)


def laid(way: Lying | Octets | Book, codes: Tensor) -> Tensor:
    """Return codes (..., bytes of a block) as they lie: what `way.put` returns, on a GPU by one launch."""
    if isinstance(way, Book) or not codes.is_cuda or take_reference("kv_attention", None, codes.device):
        return way.put(codes)
    from tersor.ops.kv_attention import launch

    return launch.placed(codes, *way.order(codes.device))


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
    codes, signs = levels.codes(dim), _are_signs(levels)
    whole = levels.bits in LANE_BITS and codes * levels.bits % 8 == 0 and codes % 8 == 0
    if not whole or not compiled_allowed("kv_attention"):
        return None
    from tersor.ops.kv_attention.lanes import Part, Signs

    fits = signs and codes % SIGN_WORD == 0 and block % SIGN_TOKENS == 0 and max(codes, block) <= SIGN_MOST
    return (Signs if fits else Part)(heads, block, room, *span, side, codes)


def words_of(words: Words, lying: tuple[Tensor, int, int], shape: tuple[int, int], room: int,
             span: tuple[int, int]) -> Worded | None:
    """Return blocks of words for kernels of the processor; numba is missed once.

    Parameters
    ----------
    lying : (Tensor, int, int)
        How far each sequence's slot is from the first page, int64 (pages, batch), in units of 16 bytes; the address of
        that page; where codes begin in a slot.
    shape : (int, int)
        Heads, tokens of a block.
    room, span
        As of `part_of`.
    """
    if not compiled_allowed("kv_attention"):
        return None
    from tersor.ops.kv_attention.worded import Worded

    far, base, start = lying
    return Worded(*shape, room, *span, words, far.numpy() * 16 + base, start)


def look_up(keys: Spelled | None, values: Spelled | None) -> bool:
    """Tell whether kernels on a GPU look words of keys and values up, once rows lie in order."""
    return keys is not None and values is not None and shelf_of(keys.book.spelling, values.book.spelling) is not None


def _are_signs(levels: Levels) -> bool:
    """Tell whether codes are bits that stand for -1 and 1."""
    return levels.bits == 1 and levels.table is not None and levels.table.tolist() == [-1.0, 1.0]


__all__ = ["Book", "Closed", "Filter", "Held", "How", "Levels", "Lying", "Octets", "Side", "Spelled", "kv_attention",
           "laid", "lie_as_octets", "lie_as_signs", "look_up", "part_of", "takes_kernel", "words_of"]
