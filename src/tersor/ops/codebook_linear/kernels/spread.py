"""Codes on the processor, spread out to numbers that matrices are multiplied with.

As in `levels`, codes stay in the order in which they are looked up; vectors are put in that order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.codebook_linear.kernels import levels
from tersor.ops.codebook_linear.kernels.levels import PLAIN, block_bytes, level, words
from tersor.ops.codebook_linear.shapes import lanes
from tersor.ops.codebook_linear.shapes.lanes import lane_codes
from tersor.ops.vectors import LANES, LONG, Vectors, how


@intrinsic(prefer_literal=True)
def _row(typing: Any, how: Any, codes: Any, table: Any, out: Any, at: Any) -> Any:
    """Write a row.

    Parameters
    ----------
    how : str
        Bits of a code, and what is not plain.
    at : (byte of the row, blocks of it, where in `out` it starts)
    """
    del typing
    return types.void(how, codes, table, out, at), _write_row


def _write_row(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Vectors(context, builder, signature, arguments)
    bits, kind = int(v.said(0)[0]), v.said(0)[1]
    codes, table, out = (v.array(place) for place in (1, 2, 3))
    first, blocks, place = (v.value(4, i) for i in range(3))
    each = lane_codes(bits)
    with v.loop(blocks) as block:
        held = words(v, codes, builder.add(first, builder.mul(block, LONG(block_bytes(bits)))), bits)
        start = builder.add(place, builder.mul(block, LONG(each * LANES)))
        for code in range(each):
            v.store(level(v, table, held, code, (bits, kind)), v.at(out, builder.add(start, LONG(code * LANES))))
    return context.get_dummy_value()


@cache
def spread(bits: int, kind: str = PLAIN) -> Any:
    """Return the kernel for codes of so many bits; `kind` as of `levels.multiply`."""
    made = how(bits, kind, sources=(lanes.__file__, levels.__file__))
    each = lane_codes(bits) * LANES

    @njit()
    def spread(codes: Any, stride: Any, table: Any, out: Any, rows: Any) -> None:
        """Write rows.

        Parameters
        ----------
        codes : uint8 (rows of `stride` bytes and a block more,)
        table : float32
            See `levels.table_of`.
        out : float32 (rows, numbers)
            Of whole blocks.
        rows : (first, last)
            Of the codes; the first goes to the first of `out`.
        """
        for i in range(rows[0], rows[1]):
            place = (i - rows[0]) * out.shape[1]
            _row(made, codes, table, out, (i * stride, out.shape[1] // each, place))

    return spread
