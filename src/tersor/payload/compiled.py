"""Packed codes spread out to bytes by a kernel that numba compiles: imported only where numba is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit

LONG, EIGHT = ir.IntType(64), 8
EVERY_BYTE = 0x0101010101010101


def _depositing(typing: Any, word: Any, width: Any) -> Any:
    """Return eight bytes, each of the next `width` bits of a word of 64 bits."""
    del typing
    return types.uint64(word, width), _written


def _written(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    del signature
    word, width = arguments
    top = builder.sub(builder.shl(LONG(1), width), LONG(1))
    if "+bmi2" in context.codegen().magic_tuple()[2].split(","):
        function = ir.FunctionType(LONG, [LONG, LONG])
        called = cgutils.get_or_insert_function(builder.module, function, "llvm.x86.bmi.pdep.64")
        return builder.call(called, [word, builder.mul(top, LONG(EVERY_BYTE))])
    out = LONG(0)
    for place in range(EIGHT):
        code = builder.and_(builder.lshr(word, builder.mul(width, LONG(place))), top)
        out = builder.or_(out, builder.shl(code, LONG(EIGHT * place)))
    return out


def _reading(typing: Any, packed: Any, place: Any) -> Any:
    """Return eight bytes from a place on, the first lowest."""
    del typing
    return types.uint64(packed, place), _read


def _read(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    address = builder.gep(array.data, [arguments[1]])
    return builder.load(builder.bitcast(address, LONG.as_pointer()), align=1)


_deposit: Any = intrinsic(_depositing)
_word: Any = intrinsic(_reading)


@njit()
def unpack(packed: Any, width: Any, first: Any, out: Any) -> None:
    """Write codes of `width` bits, 1 to 8, eight at a time.

    Parameters
    ----------
    packed : uint8 (n,)
    width : int64
    first : int64
        Byte of the first code, which starts there.
    out : uint64 (codes / 8,)
        Eight codes each. Bytes past the end of `packed` are taken to be 0.
    """
    size = packed.shape[0]
    whole = min(out.shape[0], max(0, (size - first - EIGHT) // width + 1))  # of which eight bytes can be read
    for i in range(whole):
        out[i] = _deposit(_word(packed, first + i * width), width)
    for i in range(whole, out.shape[0]):
        word = np.uint64(0)
        for j in range(width):
            place = first + i * width + j
            if place < size:
                word |= np.uint64(packed[place]) << np.uint64(EIGHT * j)
        out[i] = _deposit(word, width)
