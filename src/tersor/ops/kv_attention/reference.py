"""Attention over a compressed cache in plain torch: what the kernels mean, in any precision."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.ops.kv_attention.shapes import Closed, Held, How, Side
from tersor.ops.kv_attention.spelling import Spelled
from tersor.payload import packing


def attention(query: Tensor, held: Held, how: How, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return attention of queries, (batch, query heads, queries, dim) in `dtype`; one that sees nothing gets zeros."""
    keys, values = (every(held, side, dtype) for side in range(2))
    batch, heads, tokens, dim = keys.shape
    queries = query.shape[2]
    split = query.to(dtype).reshape(batch, heads, -1, dim)
    scores = (split @ keys.mT * how.scaling).reshape(batch, -1, queries, tokens)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if how.mask is not None:
        scores = (scores.masked_fill(~how.mask, float("-inf")) if how.mask.dtype == torch.bool
                  else scores + how.mask.to(dtype))
    elif how.causal:
        place = torch.arange(tokens, device=query.device)
        scores = scores.masked_fill(place > place[tokens - queries :, None], float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    if how.s_aux is not None:
        peak = torch.maximum(peak, how.s_aux.to(dtype)[:, None, None])
    base = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(scores - base)
    total = weights.sum(-1, keepdim=True)
    if how.s_aux is not None:
        total = total + torch.exp(how.s_aux.to(dtype)[:, None, None] - base)
    mixed = (weights.reshape(batch, heads, -1, tokens) @ values).reshape(batch, -1, queries, values.shape[3])
    return mixed / total.masked_fill(total == 0.0, 1.0)


def counted(held: Held, how: How, counts: Tensor) -> tuple[Held, How]:
    """Return what counts on the device leave of what may be held, for the last token's query.

    Where nothing is closed all that may be held stays, and a mask says what there is.
    """
    if held.closed is not None:
        closed, sinks, recent = counts.tolist()
        held = Held((held.sinks[0][:, :, :sinks], held.sinks[1][:, :, :sinks]),
                    (held.recent[0][:, :, :recent], held.recent[1][:, :, :recent]),
                    dataclasses.replace(held.closed, tokens=closed))
        return held, how if how.mask is None else dataclasses.replace(how, mask=how.mask[..., : held.tokens])
    there = torch.arange(held.tokens, device=counts.device) < counts[1] + counts[2]
    mask = there[None, None, None]
    if how.mask is not None:
        mask = how.mask[..., : held.tokens] & mask
    return held, dataclasses.replace(how, mask=mask)


def every(held: Held, which: int, dtype: torch.dtype) -> Tensor:
    """Return all keys (0) or values (1), (batch, heads, tokens, dim)."""
    parts = [held.sinks[which].to(dtype), held.recent[which].to(dtype)]
    if held.closed is not None:
        side = held.closed.values if which else held.closed.keys
        parts.insert(1, decoded(held.closed, side, parts[1].shape, dtype))
    return torch.cat(parts, 2)


def decoded(closed: Closed, side: Side | Spelled, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return closed tokens of a cache of (batch, heads, any, dim): (batch, heads, tokens, dim)."""
    if isinstance(side, Spelled):
        return _spelled(closed, side, shape, dtype)
    batch, heads, _, dim = shape
    levels, rows = side.levels, closed.blocks * heads * closed.block
    count, nbytes = levels.codes(dim), 2 if levels.steps is None else 1
    found = []
    for page, slots in zip(side.pages, side.slots, strict=True):
        held = page if slots is None else page.index_select(0, slots)
        raw = held[:, side.codes_at : side.codes_at + rows * count * levels.bits // 8].contiguous()
        if side.lying is not None:
            raw = side.lying.get(raw.unflatten(1, (closed.blocks, -1))).flatten(1)
        stored = held[:, side.scales_at : side.scales_at + nbytes * rows].contiguous()
        scales = (stored.view(torch.bfloat16) if levels.steps is None
                  else levels.steps.to(page.device)[stored.to(torch.int64)]).to(dtype)
        if levels.table is None:
            numbers = raw.view(torch.float8_e4m3fn).to(torch.float32).to(dtype)
        else:
            codes = packing.unpack(raw.flatten(), 2**levels.bits, 0, batch * rows * count)
            numbers = levels.table.to(device=page.device, dtype=dtype)[codes.to(torch.int32)]
        found.append((numbers.reshape(batch, rows, count) * scales[..., None]).reshape(batch, closed.blocks, heads,
                                                                                       closed.block, count))
    tokens = torch.cat(found, 1).transpose(1, 2).flatten(2, 3)[:, :, : closed.tokens]
    if levels.maps is not None:
        tokens = tokens @ levels.maps.to(dtype)
    return tokens if levels.offset is None else tokens + levels.offset.to(dtype)[:, None]


def _spelled(closed: Closed, side: Spelled, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return closed tokens whose bytes name words, looked up as the book says."""
    batch, heads, book = shape[0], shape[1], side.book
    rows, maps, spelling = closed.blocks * heads * closed.block, book.maps.to(dtype), book.spelling
    tables = book.tables.view(torch.float16).unflatten(1, (-1, 4)).to(dtype)
    found = []
    for page, slots in zip(side.pages, side.slots, strict=True):
        held = page if slots is None else page.index_select(0, slots)
        raw = held[:, side.codes_at : side.codes_at + rows * book.row_bytes].reshape(-1, book.row_bytes)
        codes = (raw if side.ordered else book.put(raw)).to(torch.int64)
        codes = torch.nn.functional.pad(codes, (0, spelling.lanes * spelling.each - book.row_bytes))
        numbers = [tables[spelling.entries[lane][step]][codes[:, lane * spelling.each + place]]
                   for step, place in enumerate(spelling.steps) for lane in spelling.lane_order]
        found.append(torch.cat(numbers, 1).reshape(batch, closed.blocks, heads, closed.block, -1) @ maps)
    tokens = torch.cat(found, 1).transpose(1, 2).flatten(2, 3)[:, :, : closed.tokens]
    return tokens + book.offset.to(dtype)[:, None]
