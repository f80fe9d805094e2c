"""Attention over a compressed cache on CUDA: one launch or three, of which none waits for the processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tersor.ops.kv_attention.division import (
    Division,
    division_of,
    octet_limits,
    octets_division,
    sign_limits,
    streams_division,
    words_division,
)
from tersor.ops.kv_attention.kernels import bits
from tersor.ops.kv_attention.kernels.around import merge, prepare
from tersor.ops.kv_attention.kernels.asking import ask_signs
from tersor.ops.kv_attention.kernels.attending import attend
from tersor.ops.kv_attention.kernels.multiplied import attend_octets
from tersor.ops.kv_attention.kernels.placing import place_bits
from tersor.ops.kv_attention.kernels.signed import attend_signs
from tersor.ops.kv_attention.kernels.spelled import attend_words
from tersor.ops.kv_attention.kernels.streamed import attend_streams
from tersor.ops.kv_attention.octets import UNIT, Octets
from tersor.ops.kv_attention.shapes import (
    DENSE_TURN,
    LOG2E,
    WARPS,
    Closed,
    Held,
    How,
    Side,
    element_codes,
    filters_of,
    queries_at_once,
    sign_sets,
    signs_of_token,
    some_queries,
)
from tersor.ops.kv_attention.signs import SET, WORD
from tersor.ops.kv_attention.spelling import LOOKUPS, Spelled, shelved, warps_of
from tersor.ops.workspace import multiprocessors, workspace

COLUMNS = 32  # of a program around attention
PARTS = 64  # that a program joins at a time, half as many
WIDEST = 256  # where a query has more coordinates
WIDE = 128  # numbers of a head, where registers do not hold sums of more than four queries
REGISTERS = 1 << 16  # of a multiprocessor
PLACED = 128  # words that a program puts in their places


def attention(query: Tensor, held: Held, how: How, counts: Tensor | None = None) -> Tensor:
    """Return (batch, query heads, queries, dim) in the dtype of `query`; arguments as of the op."""
    closed, query = held.closed, query.contiguous()
    assert closed is not None
    batch, heads, _, dim = held.recent[0].shape
    group = query.shape[1] // heads
    if (most := queries_at_once(group)) < query.shape[2]:
        assert counts is None
        return torch.cat([attention(*some_queries(query, held, how, slice(first, first + most)))
                          for first in range(0, query.shape[2], most)], 2)
    rows = group * query.shape[2]
    with torch.cuda.device(query.device):
        cut = _division(held, rows, multiprocessors(query.device))
        parts = batch * heads * cut.parts * rows
        scores = workspace((2, parts), torch.float32, query.device, "parts of attention")
        out = torch.empty(batch, query.shape[2], query.shape[1], dim, dtype=query.dtype, device=query.device)
        if (once := _at_once(closed)) is not None:
            sums = workspace((parts, dim), torch.float32, query.device, "parts of attention")
            once(query, held, how, (cut, scores, sums), out, counts)
            return out.transpose(1, 2)
        meet, maps, offset = _ways(closed)
        count = dim if maps is None else maps.shape[1]
        sums = workspace((parts, max(count, dim)), torch.float32, query.device, "parts of attention")
        room = max(16, 1 << (cut.parts - 1).bit_length())
        meet(query, held, how, (cut, scores, sums), counts)
        merge[(batch * heads * rows, dim // COLUMNS)](
            scores[0], scores[1], sums, _or(maps, query), _or(offset, query), _or(how.s_aux, query), out,
            cut.parts, cut.splits, heads, rows, query.shape[2], dim, count, 1 << (count - 1).bit_length(),
            max(count, dim), maps is not None, _per_head(maps, offset), offset is not None,
            how.s_aux is not None, room, min(room, PARTS if count <= WIDEST else PARTS // 2), COLUMNS, num_warps=8,
            launch_pdl=True)
    return out.transpose(1, 2)


def _division(held: Held, rows: int, processors: int) -> Division:
    closed = held.closed
    assert closed is not None
    dense, heads = held.sinks[0].shape[2] + held.recent[0].shape[2], held.recent[0].shape[0] * held.recent[0].shape[1]
    if isinstance(closed.keys, Spelled) and isinstance(closed.values, Spelled):
        return words_division(closed.tokens, dense, heads, rows, processors,
                              warps_of(closed.keys.book, closed.values.book, rows))
    if isinstance(closed.keys, Side) and isinstance(closed.keys.lying, Octets):
        return octets_division(closed.tokens, dense, heads, rows, held.recent[0].shape[3], processors)
    if isinstance(closed.keys, Side) and closed.keys.lying is not None:
        sets = sign_sets(closed, rows)
        divide = division_of if filters_of(closed) is None else streams_division
        return divide(closed.tokens, dense, heads * -(-rows // (SET * sets)), rows, processors,
                      signs=signs_of_token(closed) * sets)
    return division_of(closed.tokens, dense, heads, rows, processors)


def _ways(closed: Closed) -> tuple[Meet, Tensor | None, Tensor | None]:
    """Return what meets codes of these, and what takes sums of values to tokens: maps, and what is added."""
    if isinstance(closed.values, Spelled):
        return _meet_words, closed.values.book.maps, closed.values.book.offset
    levels = closed.values.levels
    signs = closed.values.lying is not None
    return _meet_signs if signs else _meet_codes, levels.lines if signs else levels.maps, levels.offset


def _at_once(closed: Closed) -> Once | None:
    """Return what does all in one launch, where codes are such."""
    if isinstance(closed.keys, Side) and isinstance(closed.keys.lying, Octets):
        return _multiply_octets
    return None if filters_of(closed) is None else _meet_streams


Work: TypeAlias = tuple[Division, Tensor, Tensor]
Meet: TypeAlias = Callable[[Tensor, Held, How, Work, Tensor | None], None]
Once: TypeAlias = Callable[[Tensor, Held, How, Work, Tensor, Tensor | None], None]


def _meet_codes(query: Tensor, held: Held, how: How, work: Work, counts: Tensor | None) -> None:
    """Launch what prepares queries, and what reads codes and looks their levels up."""
    (cut, scores, sums), closed = work, held.closed
    assert closed is not None
    assert isinstance(closed.keys, Side)
    assert isinstance(closed.values, Side)
    batch, heads, _, dim = held.recent[0].shape
    rows, keys, scaling = query.shape[1] // heads * query.shape[2], closed.keys.levels, _scaling(how)
    near = workspace((batch * heads, cut.rows, dim), torch.float16, query.device, "queries")
    numbers = workspace((2, batch * heads, cut.rows), torch.float32, query.device, "queries")
    prepare[(batch * heads, dim // COLUMNS)](
        query, _or(keys.maps, query), _or(keys.bounds, query), _or(keys.offset, query), near, *numbers, scaling,
        heads, rows, dim, dim, keys.maps is not None, _per_head(keys.maps, keys.offset), keys.offset is not None,
        cut.rows, element_codes(keys.bits, dim), COLUMNS, num_warps=4)
    near_side, far_side = _anchored(closed.keys), _anchored(closed.values)
    near_room, far_room = _room(closed.keys), _room(closed.values)
    attend[(cut.parts, batch * heads)](
        query, near, numbers[0], numbers[1], near_side, far_side, closed.keys.addresses, closed.values.addresses,
        near_room, far_room, closed.keys.levels.words, closed.values.levels.words,
        *_dense(query, held, how, (scaling, scores, sums, _or(counts, near_side))),
        cut.splits, heads, rows, query.shape[2], dim, closed.block, closed.blocks,
        closed.keys.levels.bits, closed.values.levels.bits, *_kinds(how, counts), cut.rows, cut.turn, DENSE_TURN, WARPS,
        num_warps=WARPS, launch_pdl=True)


def _meet_signs(query: Tensor, held: Held, how: How, work: Work, counts: Tensor | None) -> None:
    """Launch what writes the bit planes of queries, and what meets signs with them."""
    (cut, scores, sums), closed = work, held.closed
    assert closed is not None
    assert isinstance(closed.keys, Side)
    assert isinstance(closed.values, Side)
    batch, heads, _, dim = held.recent[0].shape
    rows, keys, values, scaling = (query.shape[1] // heads * query.shape[2], closed.keys.levels, closed.values.levels,
                                   _scaling(how))
    assert keys.lines is not None
    assert values.lines is not None
    count, sets, parts = keys.lines.shape[1], sign_sets(closed, rows), batch * heads
    all_ = 1 << (-(-rows // SET) - 1).bit_length()
    steps = -(-count // (4 * WORD))
    planes = workspace((parts, all_ * bits.ASKED_TILES * steps * WORD), torch.int32, query.device, "queries")
    begins = workspace((parts, 4 * steps, all_ * SET), torch.int32, query.device, "queries")
    numbers = workspace((2, parts, all_ * SET), torch.float32, query.device, "queries")
    some = min(2, all_)
    ask_signs[(parts, 4 * steps, all_ // some)](
        query, keys.turned_lines, keys.line_bounds, _or(keys.offset, query), planes, begins, *numbers, scaling, heads,
        rows, dim, count, steps, len(keys.lines) > 1, keys.offset is not None, some, all_,
        num_warps=4)
    near_side, far_side = _anchored(closed.keys), _anchored(closed.values)
    near_room, far_room = _room(closed.keys), _room(closed.values)
    attend_signs[(cut.parts, parts, -(-rows // (SET * sets)))](
        query, planes, begins, *numbers, near_side, far_side, closed.keys.addresses, closed.values.addresses,
        near_room, far_room, keys.stepped, values.stepped,
        *_dense(query, held, how, (scaling, scores, sums, _or(counts, near_side))),
        cut.splits, heads, rows, query.shape[2], dim, closed.block, closed.blocks, count, values.lines.shape[1],
        closed.keys.scale_bytes, closed.values.scale_bytes, sums.shape[1], *_kinds(how, counts), sets, all_,
        cut.rows, DENSE_TURN, WARPS, num_warps=WARPS, maxnreg=sign_limits(signs_of_token(closed) * sets)[1],
        launch_pdl=True)


def _multiply_octets(query: Tensor, held: Held, how: How, work: Work, out: Tensor, counts: Tensor | None) -> None:
    """Launch what multiplies codes as integers of 8 bits, from queries to what is to be returned."""
    (cut, scores, sums), closed = work, held.closed
    assert closed is not None
    assert isinstance(closed.keys, Side)
    assert isinstance(closed.values, Side)
    batch, heads, _, dim = held.recent[0].shape
    rows, keys, values, scaling = (query.shape[1] // heads * query.shape[2], closed.keys.levels, closed.values.levels,
                                   _scaling(how))
    sets = 1 if dim > WIDE else min(2, -(-rows // SET))
    parts = batch * heads
    near_side, far_side = _anchored(closed.keys), _anchored(closed.values)
    near_room, far_room = _room(closed.keys), _room(closed.values)
    (near_step, near_table), (far_step, far_table) = keys.octets, values.octets
    ways = tuple((one.signs is not None, one.offset is not None, one.offset is not None and len(one.offset) > 1)
                 for one in (keys, values))
    attend_octets[(cut.parts * parts, -(-rows // (SET * sets)))](
        query, _or(keys.signs, query), _or(keys.offset, query), _or(values.signs, query), _or(values.offset, query),
        _or(how.s_aux, query), out, _tickets(closed.keys, parts), near_side, far_side, closed.keys.addresses,
        closed.values.addresses, near_room, far_room, near_table, far_table, near_step, far_step, keys.stepped,
        values.stepped, *_dense(query, held, how, (scaling, scores, sums, _or(counts, near_side)), words=True),
        cut.splits, cut.dense, heads, rows, query.shape[2], dim, closed.block, closed.blocks, keys.bits, values.bits,
        closed.keys.scale_bytes, closed.values.scale_bytes, *_kinds(how, counts), *ways, how.s_aux is not None,
        cut.turn // UNIT, sets, WARPS, num_warps=WARPS, maxnreg=octet_limits(dim)[1])


def _meet_streams(query: Tensor, held: Held, how: How, work: Work, out: Tensor, counts: Tensor | None) -> None:
    """Launch what meets signs and knows their filters, from queries to what is to be returned."""
    (cut, scores, sums), closed = work, held.closed
    assert closed is not None
    assert isinstance(closed.keys, Side)
    assert isinstance(closed.values, Side)
    filters = filters_of(closed)
    assert filters is not None
    batch, heads, _, dim = held.recent[0].shape
    rows, keys, values = query.shape[1] // heads * query.shape[2], closed.keys.levels, closed.values.levels
    sets, parts = sign_sets(closed, rows), batch * heads
    near_side, far_side = _anchored(closed.keys), _anchored(closed.values)
    ways = tuple((own.turns is not None, one.offset is not None, one.offset is not None and len(one.offset) > 1)
                 for own, one in zip(filters, (keys, values), strict=True))
    attend_streams[(cut.parts * parts, -(-rows // (SET * sets)))](
        query, _or(filters[0].turns, query), _or(keys.offset, query), _or(filters[1].turns, query),
        _or(values.offset, query), _or(how.s_aux, query), out, _tickets(closed.keys, parts), near_side, far_side,
        closed.keys.addresses, closed.values.addresses, _room(closed.keys), _room(closed.values), filters[0].taps,
        filters[1].taps, keys.stepped, values.stepped,
        *_dense(query, held, how, (_scaling(how), scores, sums, _or(counts, near_side)), words=True), cut.splits,
        cut.dense, heads, rows, query.shape[2], dim, closed.block, closed.blocks,
        *(own.taps.shape[2] * dim for own in filters), closed.keys.scale_bytes, closed.values.scale_bytes,
        *_kinds(how, counts), *ways, *(tuple(own.taps.shape) for own in filters), how.s_aux is not None, sets, WARPS,
        num_warps=WARPS, maxnreg=sign_limits(signs_of_token(closed) * sets)[1])


def _tickets(side: Side, parts: int) -> Tensor:
    """Return zeros, one a part."""
    if side.tickets is None:
        return torch.zeros(parts, dtype=torch.int32, device=side.addresses.device)
    return side.tickets


def _meet_words(query: Tensor, held: Held, how: How, work: Work, counts: Tensor | None) -> None:
    """Launch what prepares queries, and what looks words up."""
    (cut, scores, sums), closed = work, held.closed
    assert closed is not None
    assert isinstance(closed.keys, Spelled)
    assert isinstance(closed.values, Spelled)
    batch, heads, _, dim = held.recent[0].shape
    keys, values, scaling = closed.keys.book, closed.values.book, _scaling(how)
    parts, rows, count = batch * heads, query.shape[1] // heads * query.shape[2], keys.maps.shape[1]
    shelf, *tables = shelved(keys, values)
    sets, warps = min(2, -(-rows // SET)), warps_of(keys, values, rows)
    near = workspace((parts, cut.rows, count), torch.float16, query.device, "queries")
    numbers = workspace((2, parts, cut.rows), torch.float32, query.device, "queries")
    prepare[(parts, count // LOOKUPS)](
        query, keys.maps, keys.bounds, keys.offset, near, *numbers, scaling, heads, rows, dim, count, True,
        len(keys.maps) > 1, True, cut.rows, 1, LOOKUPS, num_warps=4)
    near_side, far_side = _anchored(closed.keys), _anchored(closed.values)
    forms = tuple((book.row_bytes, book.spelling.each, book.spelling.steps, tall)
                  for book, tall in zip((keys, values), shelf.steps, strict=True))
    attend_words[(cut.parts, parts, -(-rows // (SET * sets)))](
        query, near.view(torch.int32), *numbers, near_side, far_side, closed.keys.addresses, closed.values.addresses,
        *tables, *_dense(query, held, how, (scaling, scores, sums, _or(counts, near_side))),
        cut.splits, heads, rows, query.shape[2], dim, closed.block, closed.blocks, *forms,
        (shelf.columns, shelf.slots, shelf.shared), sums.shape[1], *_kinds(how, counts), sets, cut.rows, DENSE_TURN,
        warps, num_warps=warps, maxnreg=REGISTERS // (32 * warps), launch_pdl=True)


def placed(codes: Tensor, places: Tensor, table: Tensor | None) -> Tensor:
    """Return blocks (..., bytes) whose bit k was bit `places[k]`, int32, of bytes mapped by `table`, uint8 (256,)."""
    near = codes.contiguous()
    out, nbytes = torch.empty_like(near), near.shape[-1]
    if near.numel():
        with torch.cuda.device(codes.device):
            place_bits[(near.numel() // nbytes, -(-nbytes // (4 * PLACED)))](
                near, places, _or(table, near), out.view(torch.int32), nbytes, table is not None, PLACED, num_warps=4)
    return out


def _scaling(how: How) -> float:
    return how.scaling * (LOG2E if how.softcap is None else 1.0)


def _dense(query: Tensor, held: Held, how: How, work: tuple[float, Tensor, Tensor, Tensor], *,
           words: bool = False) -> tuple[Any, ...]:
    """Return what kernels are given from dense sinks to the steps of masks; dense tokens as `words`, or as numbers."""
    scaling, scores, sums, counts = work
    batch, _, recent, _ = held.recent[0].shape
    assert held.closed is not None
    sink_keys, sink_values, keys, values = (_rows(one, words) for one in (*held.sinks, *held.recent))
    mask, steps = _mask(how.mask, query, batch)
    return (sink_keys, sink_values, keys, values, mask, float(how.softcap or 0.0), scaling, scores[0], scores[1], sums,
            counts, held.closed.tokens, held.sinks[0].shape[2], recent, batch, *sink_keys.stride()[:3],
            *keys.stride()[:3], *sink_values.stride()[:3], *values.stride()[:3], *steps)


def _kinds(how: How, counts: Tensor | None) -> tuple[str, bool, bool, bool]:
    """Return the kind of the mask, and whether scores are capped, tokens causal, and counts on the device."""
    return _kind(how.mask), how.softcap is not None, how.mask is None and how.causal, counts is not None


def _anchored(side: Side | Spelled) -> Tensor:
    """Return the first page from where codes begin, as words."""
    return side.pages[0].view(-1).view(torch.int32)[side.codes_at // 4 :]


def _room(side: Side) -> int:
    """Return how far scales are from where codes begin, in words."""
    return (side.scales_at - side.codes_at) // 4


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _per_head(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.shape[0] > 1 for tensor in tensors)


def _rows(tensor: Tensor, words: bool) -> Tensor:
    """Return dense tokens with their numbers side by side, two of 16 bits as a word where `words` are asked for."""
    if not words:
        return tensor if tensor.stride(3) == 1 else tensor.contiguous()
    whole = tensor.stride(3) == 1 and not (tensor.storage_offset() % 4 or any(step % 4 for step in tensor.stride()[:3]))
    return (tensor if whole else tensor.contiguous()).view(torch.int32)


def _kind(mask: Tensor | None) -> str:
    return "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"


def _mask(mask: Tensor | None, query: Tensor, batch: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return what the kernel reads of a mask, and its steps by sequence, query head, query and token."""
    if mask is None:
        return query, (0, 0, 0, 0)
    whole = mask.expand(batch, query.shape[1], query.shape[2], mask.shape[3])
    return (whole.view(torch.uint8) if mask.dtype == torch.bool else whole), whole.stride()
