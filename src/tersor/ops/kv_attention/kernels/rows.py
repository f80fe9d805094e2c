"""Instructions on closed tokens of the processor: rows of packed codes, and their scales."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tersor.ops.vectors import FLOAT, FLOATS, INT, INTS, LANES, LONG, Vectors

BYTE, SHORT = ir.IntType(8), ir.IntType(16)
_QUARTERS = range(0, LANES, 4)  # of a register, within which numbers change places fast
_LOW, _HIGH = ([q + i + of for q in _QUARTERS for i in (first, first + 1) for of in (0, LANES)] for first in (0, 2))
_LOW_TWO, _HIGH_TWO = ([q + i + of for q in _QUARTERS for of in (0, LANES) for i in (first, first + 1)]
                       for first in (0, 2))
_ROUND = 12582912.0  # 1.5 2**23: of a float32 that this is added to, the lowest bits are a whole number
AHEAD = 512  # bytes of a head's codes that are asked for before they are read


class Addressed(Vectors):
    """Instructions on what is given by addresses that are numbers."""

    def pointer(self, address: Any, kind: Any) -> Any:
        """Return an address as a pointer."""
        return self.builder.inttoptr(address, kind.as_pointer())

    def held(self, place: Any) -> Any:
        """Return the address of room that holds what lies at a place."""
        room = self.room()
        self.store(self.load(place), room)
        return room

    def higher(self, one: Any, other: Any) -> Any:
        """Return the higher numbers of two vectors; of a number that is none, the other."""
        return self.builder.select(self.builder.fcmp_ordered(">", one, other), one, other)


    def highest(self, vector: Any) -> Any:
        """Return the highest of all lanes."""
        for half in (8, 4, 2, 1):
            vector = self.higher(*(self.pick(vector, vector, range(low, low + half)) for low in (0, half)))
        return self.builder.extract_element(vector, INT(0))

    def absolute(self, vector: Any) -> Any:
        """Return sizes of numbers."""
        bits = self.builder.and_(self.builder.bitcast(vector, INTS), ir.Constant(INTS, [0x7FFFFFFF] * LANES))
        return self.builder.bitcast(bits, FLOATS)

    def rounded(self, vector: Any) -> Any:
        """Return the nearest whole numbers, of numbers less than 2**15 in size: the 16 lowest bits of integers."""
        return self.builder.bitcast(self.add(vector, self.all(_ROUND)), INTS)


class Rows(Addressed):
    """Instructions on rows of packed codes.

    Arguments of the intrinsic are those of `lanes`.

    Attributes
    ----------
    queries : int
    own : list of int
        What codes of a kind say of themselves.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        super().__init__(context, builder, signature, arguments)
        size, queries, own = self.said(0)[1:4]
        self._bytes, self.queries, self.own = size == "1", int(queries), [int(one) for one in own.split(",")]

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


__all__ = ["AHEAD", "BYTE", "SHORT", "Addressed", "Rows"]
