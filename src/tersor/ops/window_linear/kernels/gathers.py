"""Lookups in tables that memory holds: what kernels of windows ask of `Vectors` besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from tersor.ops.vectors import FLOATS, INT, LANES, LONG, Vectors, how

BYTE = ir.IntType(8)
ONE, EIGHT = ir.IntType(1), 8
FLOAT_BYTES = 4


def edition() -> str:
    """Return which edition of the instructions kernels are made of: a value around each, so that none outlives it."""
    return how(sources=(__file__,))


class Gathers(Vectors):
    """Vectors, with the instructions that look sixteen, or eight, numbers up at once, where the machine has them."""

    def gather(self, address: Any, index: Any) -> Any:
        """Return the numbers that lie so many after an address, lane by lane; an index is below 2**31."""
        place = self.builder.bitcast(address, BYTE.as_pointer())
        if self._wide:
            every = ir.Constant(ir.VectorType(ONE, LANES), [1] * LANES)
            return self.call("llvm.x86.avx512.mask.gather.dps.512", FLOATS,
                              (ir.Constant(FLOATS, [0.0] * LANES), place, index, every, INT(FLOAT_BYTES)))
        if not self._half:
            return super().gather(address, index)
        kind, parts = ir.VectorType(ir.FloatType(), EIGHT), []
        every = self.builder.bitcast(ir.Constant(ir.VectorType(INT, EIGHT), [-1] * EIGHT), kind)
        for first in (0, EIGHT):
            half = self.pick(index, index, range(first, first + EIGHT))
            parts.append(self.call("llvm.x86.avx2.gather.d.ps.256", kind,
                                    (ir.Constant(kind, [0.0] * EIGHT), place, half, every, BYTE(FLOAT_BYTES))))
        return self.pick(parts[0], parts[1], range(LANES))

    def and_all(self, vector: Any, number: Any) -> Any:
        """Return the bits that a vector shares with a number."""
        return self.builder.and_(vector, self.all(number))

    def between(self, low: Any, high: Any, shift: Any) -> Any:
        """Return the words of 32 bits that begin so many bits after those of `low`, which `high` continues."""
        return self.call("llvm.fshr.v16i32", low.type, (high, low, shift))

    def number(self, address: Any, index: Any) -> Any:
        """Return one number of an array."""
        return self.builder.load(self.at(address, index))

    @contextmanager
    def turns(self, start: Any, stop: Any) -> Iterator[Any]:
        """Write the inside of a loop over whole numbers from `start` to before `stop`."""
        with cgutils.for_range_slice(self.builder, start, stop, LONG(1), intp=LONG) as (index, _):
            yield index
