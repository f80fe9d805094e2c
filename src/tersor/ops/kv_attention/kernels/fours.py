"""Codes of one bit where registers hold 32 bytes: a byte of an index looks up in sixteen bytes, in one instruction.

The sums that four signs may have are integers of 16 bits, so that the largest is wrong by at most 2**-16 of itself; they
are looked up byte by byte, and added up as 16 bits, lower and higher bytes apart. Scores take sixteen tokens at a time,
bytes `j` and `16 + j` of their rows in the halves of a register. Mixtures take 32 bytes of rows, four tokens at a time.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from llvmlite import ir

from tersor.numerics.machine import njit
from tersor.ops.kv_attention.kernels.rows import BYTE, SHORT, Rows
from tersor.ops.vectors import FLOAT, FLOATS, INT, INTS, LANES, LONG

FOUR, WIDE = 4, 32  # signs that are looked up together; bytes of a register
MOST = 32760  # of a sum of four weights, as integers
LEAST = 2.0**-100  # of such a sum: what is less is taken for nothing
CENTRE = 32768
_BYTES, _SHORTS = ir.VectorType(BYTE, WIDE), ir.VectorType(SHORT, LANES)
_HALF = ir.VectorType(INT, LANES // 2)
_LOW, _HIGH = ([half + i + of for half in (0, LANES) for i in range(first, first + 8) for of in (0, WIDE)]
               for first in (0, 8))
_MIXED = [i + of for i in range(LANES // 2) for of in (0, LANES // 2)]
_NEXT, _OTHER = ([i ^ by for i in range(LANES)] for by in (1, 2))
_SIGNS = [[1 if place >> one & 1 else -1 for place in range(LANES)] for one in range(FOUR)]  # a sign in each table


@njit()
def lay(rows: Any, out: Any) -> None:
    """Lay queries out as scores look them up.

    Parameters
    ----------
    rows : float32 (queries, signs)
    out : float32 (at least signs up to a multiple of 256, times queries 4 + 1)
        Bytes (pairs of bytes of a row, halves of a byte, queries, lower and higher, 32), then steps of queries.
    """
    queries, signs = rows.shape
    held, pairs = out.view(np.uint8), (signs + 255) // 256 * 16
    held[: pairs * queries * 128] = 0
    steps = out[pairs * queries * 32 :]
    sums = np.empty(16, np.float32)
    for query in range(queries):
        row, most, total = rows[query], np.float32(0), np.float32(0)
        for four in range(0, signs, 4):
            size = abs(row[four]) + abs(row[four + 1]) + abs(row[four + 2]) + abs(row[four + 3])
            most = max(most, size)
            total += size
        inverse = np.float32(32767) / most if most > LEAST else np.float32(0)
        steps[query] = most / np.float32(32767) + total * np.float32(0)  # no number if a query is none
        for four in range(signs // 4):
            sums[0] = np.float32(CENTRE + 0.5)
            for one in range(4):
                number = row[4 * four + one] * inverse
                for place in range(1 << one):
                    sums[place + (1 << one)] = sums[place] + number
                    sums[place] -= number
            byte = four // 2
            pair = byte // 32 * 16 + byte % 16
            at = ((pair * 2 + four % 2) * queries + query) * 64 + byte % 32 // 16 * 16
            for place in range(16):
                number = np.int32(sums[place])
                held[at + place] = number & 255
                held[at + 32 + place] = number >> 8


def meet(v: Rows) -> None:
    """Write the scores of some rows, a multiple of sixteen; `near` is as `lay` writes it."""
    builder, queries, words = v.builder, v.queries, v.own[0]
    codes, scales, count, stride = v.rows()
    chunks, tables = -(-words // (WIDE // 4)), v.pointer(v.value(3, 0), BYTE)
    steps = builder.bitcast(v.at(tables, chunks * LANES * queries * 128), FLOAT.as_pointer())
    out, step = v.pointer(v.value(4, 0), FLOAT), v.value(4, 1)
    index = v.room(_BYTES, chunks * WIDE)
    with v.loop(builder.udiv(count, LONG(LANES))) as turn:
        first = builder.mul(turn, LONG(LANES))
        for chunk in range(chunks):
            rows = [v.load(v.pointer(_place(v, codes, builder.add(first, LONG(row)), stride, chunk), BYTE), _BYTES)
                    for row in range(LANES)]
            for pair, column in enumerate(_columns(v, rows)):
                for half, found in enumerate(_nibbles(v, column)):
                    v.store(found, v.at(index, (chunk * LANES + pair) * 2 + half))
        scale = v.scales(scales, first)
        for some in _pairs(queries):
            sums = [_Sum(v) for _ in some]
            with v.loop(LONG(chunks * WIDE)) as place:
                held = v.load(v.at(index, place), _BYTES)
                own = v.at(tables, builder.mul(place, LONG(queries * 2 * WIDE)))
                for query, one in zip(some, sums, strict=True):
                    for byte in range(2):
                        one.add(byte, _look(v, v.load(v.at(own, (query * 2 + byte) * WIDE), _BYTES), held))
            for query, one in zip(some, sums, strict=True):
                low, high = one.halves()
                found = builder.sitofp(builder.sub(builder.add(low, high), _all(CENTRE * words * 8)), FLOATS)
                size = v.mul(scale, v.all(builder.load(v.at(steps, query))))
                v.store(v.mul(found, size), v.at(out, builder.add(first, builder.mul(step, LONG(query)))))


def gather(v: Rows) -> None:
    """Add the sums of some rows, a multiple of sixteen, under weights to `out`, (vectors, signs of a byte, queries, 16)."""
    builder, queries, (words, vectors) = v.builder, v.queries, v.own
    codes, _, count, stride = v.rows()
    chunks, fours, room = -(-words // (WIDE // 4)), builder.udiv(count, LONG(FOUR)), v.pointer(v.value(4, 1), BYTE)
    index = v.at(room, builder.mul(count, LONG(16 * queries)))
    steps = _write_tables(v, room)
    with v.loop(fours) as four:
        own = v.at(index, builder.mul(four, LONG(chunks * 8 * WIDE)))
        for chunk in range(chunks):
            rows = [v.load(v.pointer(_place(v, codes, builder.add(builder.mul(four, LONG(FOUR)), LONG(row)), stride,
                                            chunk), BYTE), ir.VectorType(INT, 8)) for row in range(FOUR)]
            for bit, found in _bits(v, rows):
                v.store(found, v.at(own, (chunk * 8 + bit) * WIDE))
    centre = builder.trunc(builder.mul(fours, LONG(CENTRE)), INT)
    for chunk in range(chunks):
        with v.loop(LONG(8)) as bit:
            place = v.at(index, builder.mul(builder.add(bit, LONG(chunk * 8)), LONG(WIDE)))
            for some in _pairs(queries):
                sums = [_Sum(v) for _ in some]
                with v.loop(fours) as four:
                    held = v.load(v.at(place, builder.mul(four, LONG(chunks * 8 * WIDE))), _BYTES)
                    own = v.at(room, builder.mul(four, LONG(queries * WIDE)))
                    for query, one in zip(some, sums, strict=True):
                        for byte in range(2):
                            table = v.load(v.at(own, query * WIDE + byte * LANES), ir.VectorType(BYTE, LANES))
                            one.add(byte, _look(v, v.pick(table, table, [*range(LANES)] * 2), held))
                for query, one in zip(some, sums, strict=True):
                    for vector, found in zip(range(2 * chunk, vectors), one.halves(), strict=False):
                        _add_to(v, (vector, bit, query), builder.sub(found, v.all(centre)), steps[query])


def _add_to(v: Rows, where: tuple[int, Any, int], found: Any, step: Any) -> None:
    """Add integers times a step to the sums of a vector of bytes, of a bit, of a query."""
    (vector, bit, query), build = where, v.builder
    number = build.add(build.mul(bit, LONG(v.queries)), LONG(vector * 8 * v.queries + query))
    place = v.at(v.pointer(v.value(4, 0), FLOAT), build.mul(number, LONG(LANES)))
    v.store(v.fma(build.sitofp(found, FLOATS), v.all(build.load(step)), v.load(place)), place)


def _write_tables(v: Rows, room: Any) -> list[Any]:
    """Write the sums that the signs of four tokens may have, weighed; return the addresses of queries' steps.

    They are bytes (fours, queries, lower and higher, 16); weights as integers come behind them.
    """
    builder, queries, (_, scales, count, _) = v.builder, v.queries, v.rows()
    weights, step = v.pointer(v.value(3, 0), FLOAT), v.value(3, 1)
    shares = builder.bitcast(v.at(room, builder.mul(count, LONG(8 * queries))), FLOAT.as_pointer())
    steps = []
    for query in range(queries):
        most, total, kept = v.room(), v.room(), v.room(FLOAT)
        v.store(v.all(0.0), most)
        v.store(v.all(0.0), total)
        with v.loop(builder.udiv(count, LONG(LANES))) as turn:
            first = builder.mul(turn, LONG(LANES))
            share = v.mul(v.load(v.at(weights, builder.add(first, builder.mul(step, LONG(query))))),
                          v.scales(scales, first))
            v.store(share, v.at(shares, first))
            size = v.absolute(share)
            v.store(v.add(size, v.load(total)), total)
            size = v.add(size, v.pick(size, size, _NEXT))
            v.store(v.higher(v.add(size, v.pick(size, size, _OTHER)), v.load(most)), most)
        top = v.highest(v.load(most))
        enough = builder.fcmp_ordered(">", top, FLOAT(LEAST))
        inverse = v.all(builder.select(enough, builder.fdiv(FLOAT(MOST), top), FLOAT(0.0)))
        builder.store(builder.fadd(builder.fdiv(top, FLOAT(MOST)), builder.fmul(v.total(v.load(total)), FLOAT(0.0))),
                      kept)  # no number if a weight is none
        steps.append(kept)
        with v.loop(builder.udiv(count, LONG(LANES))) as turn:
            whole = v.rounded(v.mul(v.load(v.at(shares, builder.mul(turn, LONG(LANES)))), inverse))
            for four in range(LANES // FOUR):
                _write_table(v, whole, four, v.at(room, builder.mul(builder.add(
                    builder.mul(turn, LONG(4 * queries)), LONG(four * queries + query)), LONG(WIDE))))
    return steps


def _write_table(v: Rows, whole: Any, four: int, place: Any) -> None:
    """Write the sums that the signs of four of sixteen tokens may have: lower bytes, then higher ones."""
    builder, total = v.builder, ir.Constant(_SHORTS, [CENTRE - 65536] * LANES)
    short = builder.trunc(whole, _SHORTS)
    for one in range(FOUR):
        number = v.pick(short, short, [four * FOUR + one] * LANES)
        total = builder.add(total, builder.mul(number, ir.Constant(_SHORTS, _SIGNS[one])))
    kind = ir.VectorType(BYTE, LANES)
    v.store(builder.trunc(total, kind), place)
    v.store(builder.trunc(builder.lshr(total, ir.Constant(_SHORTS, [8] * LANES)), kind), v.at(place, LANES))


class _Sum:
    """Sums of bytes of a register: as they are, and of every other byte, for lower and for higher bytes of numbers."""

    def __init__(self, v: Rows) -> None:
        self._v, self._rooms = v, [[v.room(_SHORTS), v.room(_SHORTS)] for _ in range(2)]
        for room in itertools.chain(*self._rooms):
            v.store(ir.Constant(_SHORTS, [0] * LANES), room)

    def add(self, byte: int, found: Any) -> None:
        """Add bytes that are the lower (0) or higher (1) of numbers."""
        build, short = self._v.builder, self._v.builder.bitcast(found, _SHORTS)
        odd = build.lshr(short, ir.Constant(_SHORTS, [8] * LANES))
        for room, more in zip(self._rooms[byte], (short, odd), strict=True):
            self._v.store(build.add(self._v.load(room, _SHORTS), more), room)

    def halves(self) -> tuple[Any, Any]:
        """Return the sums at the register's first sixteen bytes, and at the others: integers of 32 bits."""
        v, build, eight = self._v, self._v.builder, ir.Constant(_SHORTS, [8] * LANES)
        split = []
        for room in self._rooms:
            whole, odd = (v.load(one, _SHORTS) for one in room)
            split.append((build.sub(whole, build.shl(odd, eight)), odd))
        found = []
        for first in (0, LANES // 2):
            parts = [[build.zext(v.pick(one, one, range(first, first + LANES // 2)), _HALF) for one in byte]
                     for byte in split]
            low, high = (v.pick(*byte, _MIXED) for byte in parts)
            found.append(build.add(low, v.left(high, 8)))
        return found[0], found[1]


def _pairs(queries: int) -> list[range]:
    """Return which queries are looked up at a time: sums of two fit registers."""
    return [range(first, min(first + 2, queries)) for first in range(0, queries, 2)]


def _place(v: Rows, codes: Any, row: Any, stride: Any, chunk: int) -> Any:
    return v.builder.add(codes, v.builder.add(v.builder.mul(row, stride), LONG(chunk * WIDE)))


def _columns(v: Rows, rows: list[Any]) -> list[Any]:
    """Return the bytes `j` of sixteen rows of 32, and bytes `16 + j` behind them, for all j: a shuffle, four times."""
    for _ in range(4):
        rows = [v.pick(rows[i], rows[i + 8], places) for i in range(8) for places in (_LOW, _HIGH)]
    return rows


def _nibbles(v: Rows, found: Any) -> tuple[Any, Any]:
    """Return the lower and the higher four bits of bytes."""
    build, mask = v.builder, ir.Constant(ir.VectorType(INT, 8), [0x0F0F0F0F] * 8)
    whole = build.bitcast(found, mask.type)
    right = build.lshr(whole, ir.Constant(mask.type, [4] * 8))
    return build.bitcast(build.and_(whole, mask), _BYTES), build.bitcast(build.and_(right, mask), _BYTES)


def _bits(v: Rows, rows: list[Any]) -> list[tuple[int, Any]]:
    """Return each bit of bytes of four rows, in the four lowest bits of bytes: (bit, bytes)."""
    def joined(one: Any, other: Any, by: int, mask: int) -> list[Any]:
        build, kind = v.builder, one.type
        low, high, shift = (ir.Constant(kind, [value] * 8) for value in (mask, mask << by, by))
        return [build.or_(build.and_(one, low), build.shl(build.and_(other, low), shift)),
                build.or_(build.and_(build.lshr(one, shift), low), build.and_(other, high))]

    twos = [joined(*rows[first : first + 2], 1, 0x55555555) for first in (0, 2)]
    found = []
    for odd in range(2):  # of bits
        for two, four in enumerate(joined(twos[0][odd], twos[1][odd], 2, 0x33333333)):
            found += zip((2 * two + odd, 2 * two + odd + 4), _nibbles(v, four), strict=True)
    return found


def _look(v: Rows, table: Any, index: Any) -> Any:
    """Return bytes of a table's half at the places that bytes of the same half of an index say."""
    return v.call("llvm.x86.avx2.pshuf.b", _BYTES, (table, index))


def _all(number: int) -> Any:
    return ir.Constant(INTS, [number] * LANES)


__all__ = ["gather", "lay", "meet"]
