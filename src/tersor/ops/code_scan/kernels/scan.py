"""The scan on the processor: sums of rounded tables bound scores from above, and few rows are looked at closely.

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
from tersor.ops.code_scan.kernels.heaps import keep
from tersor.ops.code_scan.shapes import BYTE, GROUP, MANY, NEAR, NIBBLE, TILE

INT1, INT8, INT16, INT32, LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALVES, TABLE = NIBBLE, BYTE
HALF = TILE // 2
TILE_ROWS, QUERIES, TILES = TILE, MANY, NEAR
BASES = 2.0**-48  # of a base: what adding it to scores may round away


class _Codes:
    """Instructions on the codes of a tile, at the place of a builder."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.builder = builder
        self.features = context.codegen().magic_tuple()[2].split(",")
        self.bytes, self.pairs = ir.VectorType(INT8, TILE), ir.VectorType(INT16, HALF)

    def load(self, address: Any, count: int, offset: Any = 0) -> Any:
        """Return so many bytes at an address, given as a number."""
        place = self.builder.add(address, offset if isinstance(offset, ir.Value) else LONG(offset))
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
    """Sums of 64 rows for some queries: bytes within a group of columns, then 16 bits of even and of odd rows."""

    def __init__(self, codes: _Codes, queries: int) -> None:
        self.codes, self.builder = codes, codes.builder
        self.rooms = [[self._room(codes.pairs) for _ in range(2)] for _ in range(queries)]
        self.rest = [self._room(codes.bytes) for _ in range(queries)]

    def _room(self, kind: Any) -> Any:
        room = cgutils.alloca_once(self.builder, kind)
        self.builder.store(self.codes.same(kind, 0), room)
        return room

    def widen(self, query: int, found: Any) -> None:
        """Add bytes to every row's sum: of both bytes of a pair, and of the second ones."""
        pairs = self.builder.bitcast(found, self.codes.pairs)
        second = self.builder.lshr(pairs, self.codes.same(self.codes.pairs, 8))
        for room, more in zip(self.rooms[query], (pairs, second), strict=True):
            self.builder.store(self.builder.add(self.builder.load(room), more), room)

    def close(self, out: Any) -> None:
        """Write the sums of every query: those of even rows, then of odd ones."""
        for query, (both, second) in enumerate(self.rooms):
            odd = self.builder.load(second)
            even = self.builder.sub(self.builder.load(both), self.builder.shl(odd, self.codes.same(odd.type, 8)))
            for half, sums in enumerate((even, odd)):
                place = self.builder.add(out, LONG((2 * query + half) * TILE))
                self.builder.store(sums, self.builder.inttoptr(place, sums.type.as_pointer()), align=1)


def _found_halves(codes: _Codes, held: Any, table: Any, column: Any) -> Any:
    """Return the sum of what both halves of a column look up."""
    low = codes.same(codes.bytes, 15)
    place = codes.builder.mul(column, LONG(2 * NIBBLE))
    parts = []
    for half in range(2):
        index = codes.builder.lshr(held, codes.same(codes.bytes, 4)) if half else codes.builder.and_(held, low)
        parts.append(codes.short(codes.load(table, NIBBLE, codes.builder.add(place, LONG(half * NIBBLE))), index))
    return codes.builder.add(*parts)


def _found_bytes(codes: _Codes, held: Any, table: Any, column: Any) -> Any:
    """Return what a column looks up."""
    place = codes.builder.mul(column, LONG(BYTE))
    parts = [codes.load(table, TILE, codes.builder.add(place, LONG(i))) for i in range(0, BYTE, TILE)]
    return codes.long(parts, held)


def _summing(queries: int, halves: bool) -> Any:
    """Return what sums the lookups of a tile for some queries: addresses of bytes, of tables, and of uint16 (n, 64).

    It returns whether it did: not where the machine has no such lookup.
    """
    found = _found_halves if halves else _found_bytes

    @intrinsic
    def summed(typing: Any, tile: Any, tables: Any, columns: Any, out: Any) -> Any:
        del typing

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes = _Codes(context, builder)
            if not halves and "+avx512vbmi" not in codes.features:
                return context.get_constant(types.boolean, False)
            sums, (address, addresses, count, place) = _Sums(codes, queries), arguments
            looked = [builder.extract_value(addresses, query) for query in range(queries)]
            whole = builder.udiv(count, LONG(GROUP))

            def looked_up(column: Any) -> list[Any]:
                held = codes.load(address, TILE, builder.mul(column, LONG(TILE)))
                return [found(codes, held, table, column) for table in looked]

            with cgutils.for_range(builder, whole, intp=LONG) as turn:
                first = builder.mul(turn.index, LONG(GROUP))
                total = looked_up(first)
                for column in range(1, GROUP):
                    more = looked_up(builder.add(first, LONG(column)))
                    total = [builder.add(a, b) for a, b in zip(total, more, strict=True)]
                for query, one in enumerate(total):
                    sums.widen(query, one)
            done = builder.mul(whole, LONG(GROUP))
            with cgutils.for_range(builder, builder.sub(count, done), intp=LONG) as turn:
                for room, more in zip(sums.rest, looked_up(builder.add(done, turn.index)), strict=True):
                    builder.store(builder.add(builder.load(room), more), room)
            for query, room in enumerate(sums.rest):
                sums.widen(query, builder.load(room))
            sums.close(place)
            return context.get_constant(types.boolean, True)

        return types.boolean(types.int64, types.UniTuple(types.int64, queries), types.int64, types.int64), generate

    return summed


one_halves, _many_halves = _summing(1, True), _summing(MANY, True)
_one_bytes, _many_bytes = _summing(1, False), _summing(MANY, False)


@intrinsic
def reaching(typing: Any, sums: Any, least: Any) -> Any:
    """Return which of 64 sums at an address are at least a number: bits of even rows, then of odd ones."""
    del typing, sums, least

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        kind, parts = ir.VectorType(INT16, HALF), []
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(arguments[1], INT16), INT32(0))
        floor = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, HALF), [0] * HALF))
        for half in range(2):
            place = builder.inttoptr(builder.add(arguments[0], LONG(half * TILE)), kind.as_pointer())
            reached = builder.icmp_unsigned(">=", builder.load(place, align=1), floor)
            parts.append(builder.zext(builder.bitcast(reached, INT32), LONG))
        return builder.or_(parts[0], builder.shl(parts[1], LONG(HALF)))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def highest(typing: Any, sums: Any) -> Any:
    """Return the largest of 64 sums at an address."""
    del typing, sums

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        kind, parts = ir.VectorType(INT16, HALF), []
        for half in range(2):
            place = builder.inttoptr(builder.add(arguments[0], LONG(half * TILE)), kind.as_pointer())
            parts.append(builder.load(place, align=1))
        larger = builder.select(builder.icmp_unsigned(">", *parts), *parts)
        name = f"llvm.vector.reduce.umax.v{HALF}i16"
        most = cgutils.get_or_insert_function(builder.module, ir.FunctionType(INT16, [kind]), name)
        return builder.zext(builder.call(most, [larger]), LONG)

    return types.int64(types.int64), generate


@intrinsic
def _first(typing: Any, bits: Any) -> Any:
    """Return the place of the lowest bit that is set."""
    del typing, bits

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.cttz(arguments[0], INT1(1))

    return types.int64(types.int64), generate


def _to_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


def _pointer(kind: Any) -> Any:
    """Return what makes of an address a pointer to numbers of a kind."""
    @intrinsic
    def at(typing: Any, address: Any) -> Any:
        del typing, address
        return types.CPointer(kind)(types.int64), _to_pointer
    return at


bytes_at, shorts_at, floats_at, longs_at, doubles_at = map(_pointer, (types.uint8, types.uint16, types.float32,
                                                                      types.int64, types.float64))


@njit()
def _one_by_one(held: Any, tile: Any, rough: Any, query: Any, total: Any, place: Any) -> None:
    """Write the sums of a tile's rounded lookups for a query, where the machine has no lookups in vectors."""
    for row in range(TILE_ROWS):
        found = 0
        for column in range(held.shape[1]):
            found += rough[query, column, held[tile, column, row]]
        total[place, row & 1, row >> 1] = found


@njit()
def least_of(lines: Any, query: Any, term: Any, floor: float, edges: Any, tile: Any) -> float:
    """Return what a sum of bytes must be for a row of a tile to reach a floor: -1 where none does.

    `lines` and `edges` are those of `scan`; `term` are base and weight.
    """
    base, weight = term
    wanted = floor - base - lines[query, 3] - BASES * abs(base) - max(weight * edges[tile, 2], weight * edges[tile, 3])
    value = (wanted * (edges[tile, 0] if wanted > 0 else edges[tile, 1]) - lines[query, 1]) * lines[query, 2]
    return -1 if value > lines[query, 5] else np.int64(np.ceil(value)) if value > 0 else 0


@njit()
def _product(codes: Any, columns: Any, tables: Any, halves: bool) -> float:
    """Return the sum of a row's lookups: of its first byte's address, and of a query's tables' address."""
    total, held = 0.0, bytes_at(codes)
    if halves:
        looked = numba.carray(doubles_at(tables), (2 * columns, HALVES))
        for column in range(columns):
            byte = held[column * TILE_ROWS]
            total += looked[2 * column, byte & np.uint8(15)]
            total += looked[2 * column + 1, byte >> np.uint8(4)]
    else:
        looked = numba.carray(doubles_at(tables), (columns, TABLE))
        for column in range(columns):
            total += looked[column, held[column * TILE_ROWS]]
    return total


@njit()
def look(place: Any, columns: Any, bits: Any, total: Any, visit: Any, queries: Any, found: Any) -> None:
    """Score rows of a tile that may reach the floor of a query, and keep those that do.

    `bits` name them, of the `place`: the numbers of a piece, and the tile; `total` is an address of their sums;
    `visit` are query, base and weight. Views here are of addresses: references of others are counted, which takes longer.
    """
    piece, tile = place
    codes, factors_at, offsets_at, ids_at, count, mask_at = piece[0], piece[1], piece[2], piece[3], piece[4], piece[5]
    query, base, weight = visit
    _, lines, tables = queries
    every, size = found[2].shape[1] == 1, found[0].shape[1]
    scores = numba.carray(doubles_at(np.int64(found[0].ctypes.data) + 8 * query * size), (size,))
    ids = numba.carray(longs_at(np.int64(found[1].ctypes.data) + 8 * query * size), (size,))
    filled = numba.carray(longs_at(np.int64(found[2].ctypes.data) + 8 * query), (found[2].shape[1],))
    looked = np.int64(tables.ctypes.data) + 8 * query * tables.shape[1] * tables.shape[2]
    factors, offsets, numbers, mask = floats_at(factors_at), floats_at(offsets_at), longs_at(ids_at), bytes_at(mask_at)
    slack, sums = lines[query, 3] + BASES * abs(base), shorts_at(total)
    while bits != 0:
        bit = _first(bits)
        bits &= bits - 1
        inside = 2 * bit if bit < HALF else 2 * (bit - HALF) + 1
        row = tile * TILE_ROWS + inside
        if row >= count or (mask_at != 0 and mask[row] == 0):
            continue
        share = offsets[row] * weight + base
        upper = factors[row] * (lines[query, 1] + lines[query, 0] * sums[bit]) + share + slack
        if upper < (lines[query, 4] if every else scores[0]):
            continue
        first = codes + tile * columns * TILE_ROWS + inside
        score = factors[row] * _product(first, columns, looked, tables.shape[2] == HALVES) + share
        if not every or score >= lines[query, 4]:
            keep(scores, ids, filled, score, numbers[row])


@njit()
def scan(pieces: Any, visits: Any, queries: Any, columns: Any, found: Any) -> None:
    """Keep the best rows, of so many columns, of every piece for every query, or all rows that reach a floor.

    Parameters
    ----------
    pieces : int64 (pieces, 7)
        Addresses of codes (tiles, columns, TILE), of factors, offsets and ids (count,); count; address of a mask or 0;
        address of edges, float64 (tiles, 4): the inverse of the largest and of the least factor of a tile, and its
        least and its largest offset.
    visits : (starts, who, terms)
        int64 (pieces, 2), (visits,): from which visit to which each piece has, and whose they are; float64 (visits, 2):
        base, and weight of offsets.
    queries : (bytes, lines, tables)
        uint8 (queries, lookups, size); float64 (queries, 6): step and level of the bound, the inverse of the step,
        what may be rounded away, a floor, and the largest sum of bytes; float64 (queries, lookups, size).
    found : (scores, ids, filled)
        float64 and int64 (queries, k): heaps; int64 (queries, 0), or (queries, 1): all that reach the floor are kept,
        and counted here, beyond k, too.
    """
    (starts, who, terms), (rough, lines, _), scores, every = visits, queries, found[0], found[2].shape[1] == 1
    total, least = np.empty((QUERIES, 2, TILE_ROWS // 2), np.uint16), np.empty(QUERIES, np.int64)
    sums, table = np.int64(total.ctypes.data), np.int64(rough.ctypes.data)
    each, halves = rough.shape[1] * rough.shape[2], rough.shape[2] == HALVES
    for piece in range(pieces.shape[0]):
        tiles = (pieces[piece, 4] + TILE_ROWS - 1) // TILE_ROWS
        held = numba.carray(bytes_at(pieces[piece, 0]), (tiles, columns, TILE_ROWS))
        edges = numba.carray(doubles_at(pieces[piece, 6]), (tiles, 4))
        here = longs_at(np.int64(pieces.ctypes.data) + 8 * pieces.shape[1] * piece)
        for begin in range(0, tiles, TILES):
            end, visit, last = min(tiles, begin + TILES), starts[piece, 0], starts[piece, 1]
            while visit < last:
                some = QUERIES if last - visit >= QUERIES else 1
                for tile in range(begin, end):
                    wanted = False
                    for place in range(some):
                        query = who[visit + place]
                        floor = lines[query, 4] if every else scores[query, 0]
                        term = terms[visit + place, 0], terms[visit + place, 1]
                        least[place] = least_of(lines, query, term, floor, edges, tile)
                        wanted |= least[place] >= 0
                    if not wanted:
                        continue
                    codes = pieces[piece, 0] + tile * columns * TILE_ROWS
                    if some == QUERIES:
                        several = (table + who[visit] * each, table + who[visit + 1] * each,
                                   table + who[visit + 2] * each, table + who[visit + 3] * each)
                        did = (_many_halves(codes, several, columns, sums) if halves else
                               _many_bytes(codes, several, columns, sums))
                    else:
                        alone = (table + who[visit] * each,)
                        did = (one_halves(codes, alone, columns, sums) if halves else
                               _one_bytes(codes, alone, columns, sums))
                    for place in range(some):
                        if not did:
                            _one_by_one(held, tile, rough, who[visit + place], total, place)
                        bits = reaching(sums + 2 * TILE_ROWS * place, least[place]) if least[place] >= 0 else 0
                        if bits != 0:
                            one = who[visit + place], terms[visit + place, 0], terms[visit + place, 1]
                            look((here, tile), columns, bits, sums + 2 * TILE_ROWS * place, one, queries, found)
                visit += some
