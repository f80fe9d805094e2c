"""Vector instructions in kernels for the processor: what numba's loops do not become by themselves.

A kernel is an `intrinsic` whose code is written here, instruction by instruction, in LLVM's own language, with vectors
of `LANES` numbers whatever the machine has: LLVM cuts them into registers of 128, 256 or 512 bits. One instruction has
no name common to all machines: `look`, a lookup in a table of 16 numbers that a register holds.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
LINE = 64  # bytes of memory that come together
FLOAT, INT, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
_FUSED = ("contract",)  # a product and a sum may be one instruction, where there is one
_QUARTERS = range(0, LANES, 4)  # of a register: numbers change places within them, or they do as a whole
_LOW, _HIGH = ([q + i + of for q in _QUARTERS for i in (first, first + 1) for of in (0, LANES)] for first in (0, 2))
_LOW_TWO, _HIGH_TWO = ([q + i + of for q in _QUARTERS for of in (0, LANES) for i in (first, first + 1)]
                       for first in (0, 2))
_EVEN, _ODD = ([of + q + i for of in (0, LANES) for q in (first, first + 8) for i in range(4)] for first in (0, 4))


def how(*words: object, sources: tuple[str, ...] = ()) -> str:
    """Return the constant by which kernels of one function differ, to be given to its intrinsic.

    numba keeps compiled kernels in files, and takes them from there if the kernel's module and the values around its
    function are the same. So these values are plain, and say which edition of other sources wrote the instructions:
    this module, and those whose files are named.
    """
    return " ".join(str(word) for word in (*words, *(_edition(source) for source in (__file__, *sources))))


@cache
def _edition(source: str) -> str:
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]


class Vectors:
    """Instructions at the place of a builder.

    Parameters
    ----------
    context, builder, signature, arguments
        What numba hands to the code of an intrinsic.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> None:
        self.builder, self._context = builder, context
        self._types, self._arguments = signature.args, arguments
        features = context.codegen().magic_tuple()[2].split(",")
        self._wide, self._half = "+avx512f" in features, "+avx2" in features

    def said(self, place: int) -> list[str]:
        """Return the words of an argument that is a constant of the kernel, as `how` makes it."""
        return self._types[place].literal_value.split()

    def array(self, place: int, inside: int | None = None) -> Any:
        """Return the address of an array's first number: of an argument, or of one inside an argument's tuple."""
        kind, value = self._types[place], self._arguments[place]
        if inside is not None:
            kind, value = kind.types[inside], self.builder.extract_value(value, inside)
        return self._context.make_array(kind)(self._context, self.builder, value).data

    def value(self, place: int, inside: int) -> Any:
        """Return a number inside an argument that is a tuple."""
        return self.builder.extract_value(self._arguments[place], inside)

    def at(self, address: Any, index: Any) -> Any:
        """Return the address of a number so many after another."""
        return self.builder.gep(address, [index if isinstance(index, ir.Value) else LONG(index)])

    def load(self, address: Any, kind: Any = FLOATS) -> Any:
        """Return a vector, from an address that need not be aligned."""
        return self.builder.load(self.builder.bitcast(address, kind.as_pointer()), align=1)

    def ask(self, address: Any, nbytes: int) -> None:
        """Ask for memory that is to be read soon; any address of bytes will do."""
        function = ir.FunctionType(ir.VoidType(), [address.type, INT, INT, INT])
        name = f"llvm.prefetch.p0{'' if address.type.is_opaque else 'i8'}"
        called = cgutils.get_or_insert_function(self.builder.module, function, name)
        for place in range(0, nbytes, LINE):
            self.builder.call(called, [self.at(address, place), INT(0), INT(2), INT(1)])

    def store(self, vector: Any, address: Any) -> None:
        """Write a vector, to an address that need not be aligned."""
        self.builder.store(vector, self.builder.bitcast(address, vector.type.as_pointer()), align=1)

    def room(self, kind: Any = FLOATS, count: int = 1) -> Any:
        """Return the address of memory of the kernel's own, which a register holds where it can."""
        return cgutils.alloca_once(self.builder, kind, LONG(count))

    def all(self, number: Any) -> Any:
        """Return a vector that holds a number, given as a value or as a constant, in all lanes."""
        if isinstance(number, float):
            return ir.Constant(FLOATS, [number] * LANES)
        kind = ir.VectorType(number.type, LANES)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, INT(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))

    def right(self, vector: Any, bits: int) -> Any:
        """Return a vector of integers shifted right."""
        return self.builder.lshr(vector, ir.Constant(INTS, [bits] * LANES)) if bits else vector

    def left(self, vector: Any, bits: int) -> Any:
        """Return a vector of integers shifted left."""
        return self.builder.shl(vector, ir.Constant(INTS, [bits] * LANES))

    def sub(self, one: Any, other: Any) -> Any:
        """Return a difference."""
        return self.builder.fsub(one, other)

    def mul(self, one: Any, other: Any) -> Any:
        """Return a product."""
        return self.builder.fmul(one, other)

    def either(self, one: Any, other: Any) -> Any:
        """Return the bits of both vectors."""
        return self.builder.or_(one, other)

    def add(self, one: Any, other: Any) -> Any:
        """Return a sum."""
        return self.builder.fadd(one, other)

    def fma(self, one: Any, other: Any, total: Any) -> Any:
        """Return a product, added to a total."""
        return self.builder.fadd(self.builder.fmul(one, other, flags=_FUSED), total, flags=_FUSED)

    def pick(self, one: Any, other: Any, places: Sequence[int]) -> Any:
        """Return numbers of two vectors that lie one after the other, by their places."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT, len(places)), list(places)))

    def total(self, vector: Any) -> Any:
        """Return the sum of all lanes."""
        for half in (8, 4, 2, 1):
            low, high = (self.pick(vector, vector, range(first, first + half)) for first in (0, half))
            vector = self.add(low, high)
        return self.builder.extract_element(vector, INT(0))

    @property
    def bytewise(self) -> bool:
        """Whether lookups in sixteen bytes are faster than those in sixteen numbers."""
        return self._half and not self._wide

    @property
    def sums(self) -> int:
        """Vectors of sums that registers hold, beside what is added to them."""
        return 16 if self._wide else 4

    def look(self, table: Any, index: Any, *, eight: bool = False) -> Any:
        """Return the numbers of a table of 16 at the places that the four lowest bits of an index say, lane by lane.

        Where the table is one of `eight`, twice, half of the work is enough.
        """
        if self._wide:
            return self.call("llvm.x86.avx512.permvar.sf.512", FLOATS, (table, index))
        if self._half:
            return self._look_in_eight(table, index) if eight else self._look_in_halves(table, index)
        kept = self.room()
        self.store(table, kept)
        return self.gather(self.builder.bitcast(kept, FLOAT.as_pointer()),
                           self.builder.and_(index, ir.Constant(INTS, [LANES - 1] * LANES)))

    def gather(self, address: Any, index: Any) -> Any:
        """Return the numbers that lie so many after an address, lane by lane."""
        out = ir.Constant(FLOATS, ir.Undefined)
        for lane in range(LANES):
            place = self.builder.zext(self.builder.extract_element(index, INT(lane)), LONG)
            out = self.builder.insert_element(out, self.builder.load(self.builder.gep(address, [place])), INT(lane))
        return out

    def _look_in_eight(self, table: Any, index: Any) -> Any:
        """Look eight lanes up at a time, by the three lowest bits of the index."""
        low = self.pick(table, table, range(8))
        parts = [self.call("llvm.x86.avx2.permps", low.type, (low, self.pick(index, index, range(first, first + 8))))
                 for first in (0, 8)]
        return self.pick(parts[0], parts[1], range(LANES))

    def _look_in_halves(self, table: Any, index: Any) -> Any:
        """Look eight lanes up at a time, each in both halves of the table; the fourth bit of the index chooses."""
        low, high = (self.pick(table, table, range(first, first + 8)) for first in (0, 8))
        parts, kind = [], ir.VectorType(INT, 8)
        top, none = ir.Constant(kind, [28] * 8), ir.Constant(kind, [0] * 8)
        for first in (0, 8):
            place = self.pick(index, index, range(first, first + 8))
            below, above = (self.call("llvm.x86.avx2.permps", low.type, (half, place)) for half in (low, high))
            upper = self.builder.icmp_signed("<", self.builder.shl(place, top), none)
            parts.append(self.builder.select(upper, above, below))
        return self.pick(parts[0], parts[1], range(LANES))

    def call(self, name: str, kind: Any, arguments: Sequence[Any]) -> Any:
        """Return what an instruction of LLVM's makes of arguments."""
        function = ir.FunctionType(kind, [one.type for one in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), arguments)

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """Return the 16 columns of 16 rows of 16 integers: within quarters of registers first, then quarters."""
        pairs = [self.pick(rows[i], rows[i + 1], places) for i in range(0, LANES, 2) for places in (_LOW, _HIGH)]
        fours = [self.pick(pairs[i + half], pairs[i + half + 2], places)
                 for i in range(0, LANES, 4) for half in (0, 1) for places in (_LOW_TWO, _HIGH_TWO)]
        out: list[Any] = [None] * LANES
        for j in range(4):  # quarter q of fours[4 g + j] holds column 4 q + j of rows 4 g to 4 g + 3
            first = [self.pick(fours[i + j], fours[i + 4 + j], places) for places in (_EVEN, _ODD) for i in (0, 8)]
            for odd in (0, 1):
                low, high = first[2 * odd : 2 * odd + 2]
                out[4 * odd + j], out[4 * odd + 8 + j] = (self.pick(low, high, places) for places in (_EVEN, _ODD))
        return out

    @contextlib.contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """Write the inside of a loop; yields the number of the turn."""
        with cgutils.for_range(self.builder, count, intp=LONG) as turn:
            yield turn.index
