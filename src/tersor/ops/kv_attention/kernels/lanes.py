"""Closed tokens on the processor: codes look their levels up in a register, and meet queries or weights at once.

A lane holds a unit of codes: a byte of 2 or 4 bits, three bytes of 3. A shift brings the next code of all sixteen lanes
to where the lookup takes it. Which code meets which number of a query is free, so queries come in the order of units,
and sums of values leave in it (`lanes.Part`).
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.kv_attention.shapes import unit_bytes, unit_codes
from tersor.ops.vectors import FLOAT, FLOATS, INT, INTS, LANES, LONG, Vectors, how

BYTE, SHORT = ir.IntType(8), ir.IntType(16)
_QUARTERS = range(0, LANES, 4)  # of a register, within which numbers change places fast
_LOW, _HIGH = ([q + i + of for q in _QUARTERS for i in (first, first + 1) for of in (0, LANES)] for first in (0, 2))
_LOW_TWO, _HIGH_TWO = ([q + i + of for q in _QUARTERS for of in (0, LANES) for i in (first, first + 1)]
                       for first in (0, 2))
SUMS = 16  # vectors that registers hold beside what meets them
AHEAD = 512  # bytes of a head's codes that are asked for before they are read


class Rows(Vectors):
    """Instructions on rows of packed codes, given by addresses that are numbers.

    Arguments of the intrinsic: what `how` makes, of which the word at `place_of_size` says the bytes of a scale; then
    (address of codes, of scales, rows, bytes of a row), and a table of 16 levels and 256 scales.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, *, place_of_size: int) -> None:
        super().__init__(context, builder, signature, arguments)
        self._bytes = self.said(0)[place_of_size] == "1"

    def pointer(self, address: Any, kind: Any) -> Any:
        """Return an address as a pointer."""
        return self.builder.inttoptr(address, kind.as_pointer())

    def units(self, address: Any, bits: int) -> Any:
        """Return sixteen units that lie one after another, a lane each."""
        count = LANES * (3 if bits == 3 else 1)
        kind = ir.VectorType(BYTE, count)
        held = self.builder.load(self.pointer(address, kind), align=1)
        if bits != 3:
            return self.builder.zext(held, INTS)
        none = ir.Constant(kind, [0] * count)
        places = [place for unit in range(LANES) for place in (3 * unit, 3 * unit + 1, 3 * unit + 2, count)]
        return self.builder.bitcast(self.pick(held, none, places), INTS)

    def scale(self, address: Any, index: Any) -> Any:
        """Return a row's scale."""
        if self._bytes:
            held = self.builder.load(self.at(self.pointer(address, BYTE), index))
            return self.builder.load(self.at(self.array(2), self.builder.add(self.builder.zext(held, LONG), LONG(LANES))))
        held = self.builder.load(self.at(self.pointer(address, SHORT), index), align=2)
        return self.builder.bitcast(self.builder.shl(self.builder.zext(held, INT), INT(16)), FLOAT)

    def scales(self, address: Any, index: Any) -> Any:
        """Return the scales of sixteen rows."""
        if self._bytes:
            held = self.load(self.at(self.pointer(address, BYTE), index), ir.VectorType(BYTE, LANES))
            return self.gather(self.at(self.array(2), LANES), self.builder.zext(held, INTS))
        held = self.load(self.at(self.pointer(address, SHORT), index), ir.VectorType(SHORT, LANES))
        return self.builder.bitcast(self.left(self.builder.zext(held, INTS), 16), FLOATS)

    def totals(self, sums: list[Any]) -> list[Any]:
        """Return the sums of all lanes of up to four vectors, together."""
        four = [*sums, *[self.all(0.0)] * (4 - len(sums))]
        pairs = [self.add(self.pick(one, other, _LOW), self.pick(one, other, _HIGH))
                 for one, other in (four[:2], four[2:])]  # lanes take turns: one, other, one, other
        whole = self.add(self.pick(*pairs, _LOW_TWO), self.pick(*pairs, _HIGH_TWO))
        for half in (8, 4):
            low, high = (self.pick(whole, whole, range(first, first + half)) for first in (0, half))
            whole = self.add(low, high)
        return [self.builder.extract_element(whole, INT(i)) for i in range(len(sums))]

    def rows(self) -> tuple[Any, Any, Any, Any]:
        """Return the addresses of codes and of scales, how many rows there are, and the bytes of each."""
        return tuple(self.value(1, i) for i in range(4))  # type: ignore[return-value]


@intrinsic(prefer_literal=True)
def _meet(typing: Any, how: Any, rows: Any, table: Any, near: Any, out: Any) -> Any:
    """Write the scores of some rows.

    Parameters
    ----------
    how : str
        Bits of a code, vectors of units a row, queries, bytes of a scale.
    rows : (address of codes, of scales, rows, bytes of a row)
    table : float32 (272,)
        Levels, then what scales of a byte stand for.
    near : (address of float32 (vectors, codes of a unit, queries, 16),)
    out : (address of the first query's first score, numbers between queries)
    """
    del typing
    return types.void(how, rows, table, near, out), _write_meet


def _write_meet(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Rows(context, builder, signature, arguments, place_of_size=3)
    bits, vectors, queries = (int(word) for word in v.said(0)[:3])
    each, size = unit_codes(bits), unit_bytes(bits) * LANES
    codes, scales, count, stride = v.rows()
    table, near = v.load(v.array(2)), v.pointer(v.value(3, 0), FLOAT)
    out, step = v.pointer(v.value(4, 0), FLOAT), v.value(4, 1)
    with v.loop(count) as row:
        line = builder.add(codes, builder.mul(row, stride))
        v.ask(v.pointer(builder.add(line, LONG(AHEAD)), BYTE), 1)
        sums = [v.all(0.0) for _ in range(queries)]
        for vector in range(vectors):
            held = v.units(builder.add(line, LONG(vector * size)), bits)
            for code in range(each):
                found = v.look(table, v.right(held, code * bits))
                for query in range(queries):
                    met = v.load(v.at(near, ((vector * each + code) * queries + query) * LANES))
                    sums[query] = v.fma(found, met, sums[query])
        scale = v.scale(scales, row)
        for query, one in enumerate(v.totals(sums)):
            place = builder.add(row, builder.mul(step, LONG(query)))
            builder.store(builder.fmul(one, scale), v.at(out, place))
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def _gather(typing: Any, how: Any, rows: Any, table: Any, weights: Any, out: Any) -> Any:
    """Add the sums of some rows under weights to `out`, float32 (vectors, codes of a unit, queries, 16), by its address.

    Parameters
    ----------
    how, rows, table
        As of `_meet`.
    weights : (address of the first query's first weight, numbers between queries)
    """
    del typing
    return types.void(how, rows, table, weights, out), _write_gather


def _write_gather(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Rows(context, builder, signature, arguments, place_of_size=3)
    bits, vectors, queries = (int(word) for word in v.said(0)[:3])
    each, size = unit_codes(bits), unit_bytes(bits) * LANES
    codes, scales, count, stride = v.rows()
    table, out = v.load(v.array(2)), v.pointer(v.value(4, 0), FLOAT)
    weights, step = v.pointer(v.value(3, 0), FLOAT), v.value(3, 1)
    for vector, some in product(range(vectors), _turns(each, queries)):
        places = [v.at(out, ((vector * each + code) * queries + i) * LANES) for code in some for i in range(queries)]
        sums = [v.room() for _ in places]
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(place), room)
        with v.loop(count) as row:
            line = builder.add(codes, builder.add(builder.mul(row, stride), LONG(vector * size)))
            v.ask(v.pointer(builder.add(line, LONG(AHEAD)), BYTE), 1)
            scale, shares = v.scale(scales, row), []
            for query in range(queries):
                place = builder.add(row, builder.mul(step, LONG(query)))
                shares.append(v.all(builder.fmul(builder.load(v.at(weights, place)), scale)))
            held = v.units(line, bits)
            for turn, code in enumerate(some):
                found = v.look(table, v.right(held, code * bits))
                for query, share in enumerate(shares):
                    room = sums[turn * queries + query]
                    v.store(v.fma(found, share, v.load(room)), room)
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(room), place)
    return context.get_dummy_value()


def _turns(codes: int, queries: int) -> list[range]:
    """Return which codes of a unit are met at a time: so many that the sums of all queries fit registers."""
    each = max(1, SUMS // queries)
    return [range(first, min(first + each, codes)) for first in range(0, codes, each)]


@cache
def scores(bits: int, vectors: int, queries: int, size: int) -> Any:
    """Return the kernel of scores for codes of so many bits, vectors of units a row, queries, and bytes of a scale."""
    made = how(bits, vectors, queries, size)

    @njit()
    def scores(addresses: Any, form: Any, table: Any, near: Any, out: Any, tasks: Any) -> None:
        """Write the scores of some heads of some sequences.

        Parameters
        ----------
        addresses : int64 (pages, sequences)
        form : (codes_at, scales_at, bytes of a row, heads, tokens of a block, blocks of a page, first block, last)
        table : float32 (272,)
        near : float32 (tasks, vectors, codes of a unit, queries, 16)
        out : float32 (tasks, queries, tokens)
        tasks : (first, last)
            Of all heads of all sequences.
        """
        codes_at, scales_at, stride, heads, block, room, low, high = form
        width, each = near.size // near.shape[0] * 4, out.shape[1] * out.shape[2] * 4
        for task in range(tasks[0], tasks[1]):
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                row = (place % room * heads + task % heads) * block
                rows = base + codes_at + row * stride, base + scales_at + row * size, block, stride
                _meet(made, rows, table, (near.ctypes.data + task * width,),
                      (out.ctypes.data + task * each + (place - low) * block * 4, out.shape[2]))

    return scores


@cache
def mixture(bits: int, vectors: int, queries: int, size: int) -> Any:
    """Return the kernel of sums under weights for so many bits, vectors of units a row, queries, and bytes of a scale."""
    made = how(bits, vectors, queries, size)

    @njit()
    def mixture(addresses: Any, form: Any, table: Any, weights: Any, out: Any, tasks: Any) -> None:
        """Add the sums of some heads of some sequences to `out`, as `near` of `scores` lies; weights as `out` there."""
        codes_at, scales_at, stride, heads, block, room, low, high = form
        width, each = out.size // out.shape[0] * 4, weights.shape[1] * weights.shape[2] * 4
        for task in range(tasks[0], tasks[1]):
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                row = (place % room * heads + task % heads) * block
                rows = base + codes_at + row * stride, base + scales_at + row * size, block, stride
                _gather(made, rows, table, (weights.ctypes.data + task * each + (place - low) * block * 4,
                                            weights.shape[2]), (out.ctypes.data + task * width,))

    return mixture


__all__ = ["BYTE", "SUMS", "Rows", "mixture", "scores"]
