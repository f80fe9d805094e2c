"""Attention of one token in one kernel: a program for each of its heads.

Such a kernel waits for memory: so a block's keys and values are all asked for before the block's scores are complete.
Of places that the mask hides nothing is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # places of which a program holds keys and values in registers, at most
WARPS = 8
LOG2_E = 1.4426950408889634


@triton.jit
def _attend(query, key, value, mask, out, factor, QUERY: tl.constexpr, KEY: tl.constexpr,  # noqa: PLR0913
            KEY_PLACE: tl.constexpr, VALUE: tl.constexpr, VALUE_PLACE: tl.constexpr, SEEN: tl.constexpr,
            PLACES: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
            SEEN_ONLY: tl.constexpr):
    # HEADS heads share keys and values, a group; `factor` is the scaling, to the base 2. Strides (of a head, of groups
    # and their places, of the mask) are constants: then loads of a thread have one address, and offsets.
    tl.extra.cuda.gdc_launch_dependents()  # what follows may ask for its codes meanwhile
    head = tl.program_id(0)
    group = head // HEADS
    column = tl.arange(0, SIZE)
    key += group * KEY
    value += group * VALUE
    wanted = tl.load(query + head * QUERY + column).to(tl.float32) * factor
    peak = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    found = tl.zeros([SIZE], tl.float32)
    for start in range(0, PLACES, BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen = tl.load(mask + place * SEEN, place < PLACES, other=0) != 0
        read = seen if SEEN_ONLY else place < PLACES
        keys = tl.load(key + (place[:, None] * KEY_PLACE + column[None, :]), read[:, None])  # anything elsewhere
        values = tl.load(value + (place[:, None] * VALUE_PLACE + column[None, :]), read[:, None], other=0.0)
        scores = tl.where(seen, tl.sum(keys.to(tl.float32) * wanted[None, :], 1), -float("inf"))
        most = tl.maximum(peak, tl.max(scores, 0))
        base = tl.where(most == -float("inf"), 0.0, most)  # where all of the first blocks is hidden
        weights, before = tl.exp2(scores - base), tl.exp2(peak - base)
        total = total * before + tl.sum(weights, 0)
        found = found * before + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        peak = most
    tl.store(out + head * SIZE + column, (found / total).to(out.dtype.element_ty))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, *,
           seen_only: bool = True) -> Tensor:
    """Return what a token's heads attend to, (1, heads, 1, size), contiguous, in the query's dtype.

    Parameters
    ----------
    query : Tensor
        (1, heads, 1, size), size a power of 2.
    key, value : Tensor
        (1, groups, places, size), of any strides but the last, which is 1.
    mask : Tensor
        Bool, (1, 1, 1, places): of places attended to, at least one.
    scaling : float
        Of scores.
    seen_only : bool
        Whether nothing is read of the other places: then loads wait for the mask, but are fewer.

    Raises
    ------
    ValueError
        If shapes or strides are others.
    """
    (one, heads, tokens, size), (_, groups, places, _) = query.shape, key.shape
    if one != 1 or tokens != 1 or size & (size - 1) or heads % groups or mask.shape != (1, 1, 1, places):
        raise ValueError(f"no kernel for a query {tuple(query.shape)}, keys {tuple(key.shape)}, "
                         f"a mask {tuple(mask.shape)}")
    if key.shape != value.shape or {query.stride(3), key.stride(3), value.stride(3)} != {1}:
        raise ValueError("no kernel for these strides, or for values of another shape than keys")
    out = torch.empty(1, heads, 1, size, dtype=query.dtype, device=query.device)
    _attend[(heads,)](query, key, value, mask, out, scaling * LOG2_E, query.stride(1), *key.stride()[1:3],
                      *value.stride()[1:3], mask.stride(3), places, heads // groups, size,
                      min(BLOCK, triton.next_power_of_2(places)), seen_only, num_warps=WARPS)
    return out
