"""Lookups of a tile in vectors: 64 rows at a time, of half bytes in tables of 16 bytes, of bytes in tables of 256.

Half bytes go through `pshufb`, bytes through `vpermi2b`, where the machine has such instructions. Other machines look up
one by one, which means the same. Addresses are numbers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.code_scan.shapes import BYTE, GROUP, MANY, NIBBLE, TILE

INT1, INT8, INT16, INT32, LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALVES, TABLE = NIBBLE, BYTE
HALF = TILE // 2
TILE_ROWS, QUERIES = TILE, MANY


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
                total, column = looked_up(turn.index), turn.index
                for _ in range(1, GROUP):
                    column = builder.add(column, whole)
                    more = looked_up(column)
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
def lowest_bit(typing: Any, bits: Any) -> Any:
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
def _one_by_one(codes: Any, table: Any, columns: Any, sums: Any) -> None:
    """Write the sums of a tile's lookups of bytes, where the machine has no lookups in vectors; all are addresses."""
    held, rough, total = bytes_at(codes), bytes_at(table), shorts_at(sums)
    for row in range(TILE_ROWS):
        found = 0
        for column in range(columns):
            found += rough[column * TABLE + held[column * TILE_ROWS + row]]
        total[(row & 1) * (TILE_ROWS // 2) + (row >> 1)] = found


@njit()
def sum_one(codes: Any, table: Any, columns: Any, halves: bool, sums: Any) -> None:
    """Write the sums of a tile's rounded lookups for a query; addresses of codes, of its table, and of uint16 (64,)."""
    if not (one_halves(codes, (table,), columns, sums) if halves else _one_bytes(codes, (table,), columns, sums)):
        _one_by_one(codes, table, columns, sums)


@njit()
def sum_many(codes: Any, tables: Any, columns: Any, halves: bool, sums: Any) -> None:
    """Do as `sum_one` does for four queries: addresses of four tables, and of uint16 (4, 64)."""
    if not (_many_halves(codes, tables, columns, sums) if halves else _many_bytes(codes, tables, columns, sums)):
        for place in range(QUERIES):
            _one_by_one(codes, tables[place], columns, sums + 2 * TILE_ROWS * place)
