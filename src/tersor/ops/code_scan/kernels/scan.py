"""The scan on the processor: sums of rounded tables bound every score from above, and few rows are looked at closely.

Bytes are looked up for 64 rows at a time, in vector instructions where the machine has such lookups: half bytes in tables
of 16 bytes, with `pshufb`, and bytes in tables of 256, with `vpermi2b`. Other machines look up one by one, which means the
same. All is in one module, because numba keeps what it has compiled for as long as the module stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.code_scan.shapes import BYTE, FLUSH, NIBBLE, TILE

INT8, INT16, INT32, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALVES, TABLE = NIBBLE, BYTE


class _Codes:
    """Instructions on the codes of a tile, at the place of a builder."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.builder = builder
        self.features = context.codegen().magic_tuple()[2].split(",")
        self.bytes, self.pairs = ir.VectorType(INT8, TILE), ir.VectorType(INT16, TILE // 2)

    def load(self, address: Any, offset: Any, count: int) -> Any:
        """Return so many bytes at an address, given as a number."""
        place = self.builder.add(address, offset)
        kind = ir.VectorType(INT8, count)
        return self.builder.load(self.builder.inttoptr(place, kind.as_pointer()), align=1)

    def call(self, name: str, arguments: Sequence[Any]) -> Any:
        """Return what an instruction gives for vectors of one type."""
        function = ir.FunctionType(arguments[0].type, [one.type for one in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), arguments)

    def pick(self, one: Any, other: Any, places: Sequence[int]) -> Any:
        """Return numbers of two vectors that lie one after the other."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT32, len(places)), list(places)))

    def same(self, kind: Any, number: int) -> Any:
        """Return a vector of one number."""
        return ir.Constant(kind, [number] * kind.count)

    def short(self, table: Any, index: Any) -> Any:
        """Return bytes of a table of 16 at 64 places, each below 16."""
        for feature, width, name in (("+avx512bw", 64, "avx512.pshuf.b.512"), ("+avx2", 32, "avx2.pshuf.b"),
                                     ("+ssse3", 16, "ssse3.pshuf.b.128")):
            if feature in self.features:
                wide = self.pick(table, table, [i % NIBBLE for i in range(width)])
                parts = [self.call(f"llvm.x86.{name}", (wide, self.pick(index, index, range(i, i + width))))
                         for i in range(0, TILE, width)]
                return self._joined(parts)
        return self._one_by_one(table, index)

    def long(self, table: Sequence[Any], index: Any) -> Any:
        """Return bytes of a table of 256, in four vectors, at 64 places."""
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        low, high = (self.call(name, (table[i], index, table[i + 1])) for i in (0, 2))
        return self.builder.select(self.builder.icmp_signed("<", index, self.same(self.bytes, 0)), high, low)

    def _joined(self, parts: list[Any]) -> Any:
        while len(parts) > 1:
            count = parts[0].type.count
            parts = [self.pick(a, b, range(2 * count)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def _one_by_one(self, table: Any, index: Any) -> Any:
        room = cgutils.alloca_once(self.builder, table.type)
        self.builder.store(table, room)
        first = self.builder.bitcast(room, INT8.as_pointer())
        out = ir.Constant(self.bytes, ir.Undefined)
        for lane in range(TILE):
            place = self.builder.zext(self.builder.extract_element(index, INT32(lane)), LONG)
            out = self.builder.insert_element(out, self.builder.load(self.builder.gep(first, [place])), INT32(lane))
        return out


class _Sums:
    """Sums of bytes for 64 rows, 16 bits each: of all bytes of pairs, and of the second ones."""

    def __init__(self, codes: _Codes) -> None:
        self.codes, self.builder = codes, codes.builder
        self.both, self.second = (cgutils.alloca_once(codes.builder, codes.pairs) for _ in range(2))
        for room in (self.both, self.second):
            codes.builder.store(codes.same(codes.pairs, 0), room)

    def add(self, found: Any) -> None:
        """Add a byte to every row's sum."""
        pairs = self.builder.bitcast(found, self.codes.pairs)
        for room, more in ((self.both, pairs), (self.second, self.builder.lshr(pairs, self.codes.same(
                self.codes.pairs, 8)))):
            self.builder.store(self.builder.add(self.builder.load(room), more), room)

    def close(self, total: Any) -> None:
        """Add the sums to those of 64 rows in memory, int32."""
        builder, codes = self.builder, self.codes
        second = builder.load(self.second)
        first = builder.sub(builder.load(self.both), builder.shl(second, codes.same(codes.pairs, 8)))
        wide = codes.pick(first, second, [i // 2 + TILE // 2 * (i % 2) for i in range(TILE)])
        kind = ir.VectorType(INT32, TILE)
        place = builder.bitcast(total, kind.as_pointer())
        builder.store(builder.add(builder.load(place, align=4), builder.zext(wide, kind)), place, align=4)


@intrinsic
def sum_halves(typing: Any, tile: Any, tables: Any, columns: Any, total: Any) -> Any:
    """Add what half bytes look up: addresses of bytes (columns, 64) and of tables (2 columns, 16); int32 (64,)."""
    del typing

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes = _Codes(context, builder)
        sums = _Sums(codes)
        address, table, count = arguments[:3]
        low = codes.same(codes.bytes, 15)
        with cgutils.for_range(builder, count, intp=LONG) as turn:
            held = codes.load(address, builder.mul(turn.index, LONG(TILE)), TILE)
            for half in range(2):
                place = builder.add(builder.mul(turn.index, LONG(2 * NIBBLE)), LONG(half * NIBBLE))
                index = builder.lshr(held, codes.same(codes.bytes, 4)) if half else builder.and_(held, low)
                sums.add(codes.short(codes.load(table, place, NIBBLE), index))
        sums.close(context.make_array(signature.args[3])(context, builder, arguments[3]).data)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, total), generate


@intrinsic
def sum_bytes(typing: Any, tile: Any, tables: Any, columns: Any, total: Any) -> Any:
    """Add what bytes look up: addresses of bytes (columns, 64) and of tables (columns, 256); int32 (64,).

    Returns whether it did: not where the machine has no such lookup.
    """
    del typing

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes = _Codes(context, builder)
        if "+avx512vbmi" not in codes.features:
            return context.get_constant(types.boolean, False)
        sums = _Sums(codes)
        address, table, count = arguments[:3]
        with cgutils.for_range(builder, count, intp=LONG) as turn:
            held = codes.load(address, builder.mul(turn.index, LONG(TILE)), TILE)
            first = builder.mul(turn.index, LONG(BYTE))
            parts = [codes.load(table, builder.add(first, LONG(i)), TILE) for i in range(0, BYTE, TILE)]
            sums.add(codes.long(parts, held))
        sums.close(context.make_array(signature.args[3])(context, builder, arguments[3]).data)
        return context.get_constant(types.boolean, True)

    return types.boolean(types.int64, types.int64, types.int64, total), generate


TILE_ROWS = TILE
MOST = FLUSH


def _to_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


def _pointer(kind: Any) -> Any:
    """Return what makes of an address a pointer to numbers of a kind."""
    @intrinsic
    def at(typing: Any, address: Any) -> Any:
        del typing, address
        return types.CPointer(kind)(types.int64), _to_pointer
    return at


_bytes_at, _shorts_at, _floats_at, _longs_at = map(_pointer, (types.uint8, types.uint16, types.float32, types.int64))


@njit()
def _sum(codes: Any, tile: Any, tables: Any, query: Any, total: Any) -> None:
    """Write the sums of a tile's rounded lookups; by addresses, because a view of an array costs more than a lookup."""
    for row in range(TILE_ROWS):
        total[row] = 0
    columns, lookups, size = codes.shape[1], tables.shape[1], tables.shape[2]
    held = np.int64(codes.ctypes.data) + tile * columns * TILE_ROWS
    table = np.int64(tables.ctypes.data) + query * lookups * size
    for first in range(0, columns, MOST):
        some = min(columns - first, MOST)
        if size == HALVES:
            sum_halves(held + first * TILE_ROWS, table + 2 * first * HALVES, some, total)
        elif not sum_bytes(held + first * TILE_ROWS, table + first * TABLE, some, total):
            for column in range(first, first + some):
                for row in range(TILE_ROWS):
                    total[row] += tables[query, column, codes[tile, column, row]]


@njit()
def _bound(total: Any, places: Any, line: Any, upper: Any) -> bool:
    """Write what the scores of 64 rows are at most; return whether one reaches the floor, or float32 has overflowed.

    `places` are the addresses of factors and offsets.
    """
    slope, level, weight, floor = line
    factors = numba.carray(_floats_at(places[0]), (TILE_ROWS,))
    offsets = numba.carray(_floats_at(places[1]), (TILE_ROWS,))
    found = np.int32(0)
    for row in range(TILE_ROWS):
        value = factors[row] * (slope * np.float32(total[row]) + level) + offsets[row] * weight
        upper[row] = value
        found |= np.int32(not value < floor)
    return found != 0


@njit()
def _product(tile: Any, row: Any, tables: Any) -> float:
    """Return the sum of a row's lookups."""
    total = 0.0
    if tables.shape[1] == HALVES:
        for column in range(tile.shape[0]):
            held = tile[column, row]
            total += tables[2 * column, held & np.uint8(15)]
            total += tables[2 * column + 1, held >> np.uint8(4)]
    else:
        for column in range(tile.shape[0]):
            total += tables[column, tile[column, row]]
    return total


@njit()
def _replace(scores: Any, ids: Any, score: float, number: int) -> None:
    """Put a row in the place of the worst: the root of a heap whose parents are worse than their children."""
    size, place = scores.shape[0], 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (scores[other] < scores[child]
                             or (scores[other] == scores[child] and ids[other] > ids[child])):
            child = other
        if scores[child] > score or (scores[child] == score and ids[child] < number):
            break
        scores[place], ids[place] = scores[child], ids[child]
        place = child
    scores[place], ids[place] = score, number


@njit()
def _keep(scores: Any, ids: Any, filled: Any, score: float, number: int) -> None:
    """Keep a row: in a heap of the best, or, where floors are fixed, one after another while there is room."""
    if filled.shape[0] == 0:
        if score > scores[0] or (score == scores[0] and number < ids[0]):
            _replace(scores, ids, score, number)
    else:
        if filled[0] < scores.shape[0]:
            scores[filled[0]], ids[filled[0]] = score, number
        filled[0] += 1


@njit()
def sort_best(scores: Any, ids: Any, best: Any, numbers: Any) -> None:
    """Write the best of some scores and their ids, by falling scores and rising ids; -1 for minus infinity."""
    for query in range(scores.shape[0]):
        for place in range(best.shape[1]):
            best[query, place], numbers[query, place] = -np.inf, np.iinfo(np.int64).max
        for found in range(scores.shape[1]):
            score, number = scores[query, found], ids[query, found]
            if score > best[query, 0] or (score == best[query, 0] and number < numbers[query, 0]):
                _replace(best[query], numbers[query], score, number)
        for last in range(best.shape[1] - 1, 0, -1):  # the root is the worst of a heap
            score, number = best[query, 0], numbers[query, 0]
            best_last, number_last = best[query, last], numbers[query, last]
            _replace(best[query, :last], numbers[query, :last], best_last, number_last)
            best[query, last], numbers[query, last] = score, number
        for place in range(best.shape[1]):
            if best[query, place] == -np.inf:
                numbers[query, place] = -1


@njit()
def scan(pieces: Any, visits: Any, queries: Any, columns: Any, found: Any) -> None:
    """Keep the best rows of every piece for every query, or all rows that reach a floor.

    Parameters
    ----------
    pieces : int64 (pieces, 6)
        Addresses of codes (tiles, columns, TILE), of factors, offsets and ids (count,); count; address of a mask or 0.
    visits : (starts, who, terms)
        int64 (pieces + 1,), (visits,): whose turn it is in each piece; float64 (visits, 2): base, and weight of offsets.
    queries : (bytes, lines, tables)
        uint8 (queries, lookups, size); float64 (queries, 5): step and level of the bound, size of sums, what float32
        may lose, and a floor; float64 (queries, lookups, size).
    columns : int
        Of a row.
    found : (scores, ids, filled)
        float64 and int64 (queries, k): heaps; int64 (queries, 0), or (queries, 1): all that reach the floor are kept,
        and counted here, beyond k, too.
    """
    starts, who, terms = visits
    rough, lines, tables = queries
    scores, ids, filled = found
    total, upper = np.empty(TILE_ROWS, np.int32), np.empty(TILE_ROWS, np.float32)
    last = np.zeros((2, TILE_ROWS), np.float32)
    every = filled.shape[1] == 1
    for piece in range(pieces.shape[0]):
        count = pieces[piece, 4]
        tiles = (count + TILE_ROWS - 1) // TILE_ROWS
        held = numba.carray(_bytes_at(pieces[piece, 0]), (tiles, columns, TILE_ROWS))
        factors = numba.carray(_floats_at(pieces[piece, 1]), (count,))
        offsets = numba.carray(_floats_at(pieces[piece, 2]), (count,))
        numbers = numba.carray(_longs_at(pieces[piece, 3]), (count,))
        masked = pieces[piece, 5] != 0
        mask = numba.carray(_bytes_at(pieces[piece, 5]), (count,))
        for tile in range(tiles):
            start = tile * TILE_ROWS
            stop = min(count, start + TILE_ROWS)
            places = pieces[piece, 1] + 4 * start, pieces[piece, 2] + 4 * start
            if stop < start + TILE_ROWS:  # what lies behind the last row is not read
                last[0, : stop - start], last[1, : stop - start] = factors[start:stop], offsets[start:stop]
                places = np.int64(last.ctypes.data), np.int64(last.ctypes.data) + 4 * TILE_ROWS
            for visit in range(starts[piece], starts[piece + 1]):
                query, base, weight = who[visit], terms[visit, 0], terms[visit, 1]
                floor = (lines[query, 4] if every else scores[query, 0]) - base - lines[query, 3]
                line = (np.float32(lines[query, 0]), np.float32(lines[query, 1]), np.float32(weight), np.float32(floor))
                _sum(held, tile, rough, query, total)
                if not _bound(total, places, line, upper):
                    continue
                for row in range(stop - start):
                    if upper[row] < floor or (masked and mask[start + row] == 0):
                        continue
                    score = (factors[start + row] * _product(held[tile], row, tables[query])
                             + offsets[start + row] * weight + base)
                    if every and score < lines[query, 4]:
                        continue
                    _keep(scores[query], ids[query], filled[query], score, numbers[start + row])
                    if not every:
                        floor = scores[query, 0] - base - lines[query, 3]


@njit()
def scan_words(pieces: Any, visits: Any, queries: Any, columns: Any, found: Any) -> None:
    """Do as `scan` does for codes of more than 256 words, int16 in memory: every score is computed."""
    starts, who, terms = visits
    lines, tables = queries
    scores, ids, filled = found
    every, sums = filled.shape[1] == 1, np.empty(TILE_ROWS)
    for piece in range(pieces.shape[0]):
        count = pieces[piece, 4]
        tiles = (count + TILE_ROWS - 1) // TILE_ROWS
        held = numba.carray(_shorts_at(pieces[piece, 0]), (tiles, columns, TILE_ROWS))
        factors = numba.carray(_floats_at(pieces[piece, 1]), (count,))
        offsets = numba.carray(_floats_at(pieces[piece, 2]), (count,))
        numbers = numba.carray(_longs_at(pieces[piece, 3]), (count,))
        masked = pieces[piece, 5] != 0
        mask = numba.carray(_bytes_at(pieces[piece, 5]), (count,))
        for tile in range(tiles):
            start = tile * TILE_ROWS
            for visit in range(starts[piece], starts[piece + 1]):
                query = who[visit]
                for row in range(TILE_ROWS):
                    sums[row] = 0.0
                for column in range(columns):
                    table = tables[query, column]
                    for row in range(TILE_ROWS):
                        sums[row] += table[held[tile, column, row]]
                for row in range(start, min(count, start + TILE_ROWS)):
                    if masked and mask[row] == 0:
                        continue
                    score = factors[row] * sums[row - start] + offsets[row] * terms[visit, 1] + terms[visit, 0]
                    if not every or score >= lines[query, 4]:
                        _keep(scores[query], ids[query], filled[query], score, numbers[row])
