"""Codes on the processor, spread out to numbers that matrices are multiplied with.

As in `levels`, codes stay in the order in which they are looked up; vectors are put in that order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
from numba import types
from numba.core.extending import intrinsic

from tersor.ops.codebook_linear.kernels import levels
from tersor.ops.codebook_linear.kernels.levels import PLAIN, block_bytes, level, words
from tersor.ops.codebook_linear.shapes import lanes
from tersor.ops.codebook_linear.shapes.lanes import lane_codes
from tersor.ops.vectors import INT, INTS, LANES, LONG, Vectors, how

LOW, HIGH = 0x0000FFFF, 0xFFFF0000


@intrinsic(prefer_literal=True)
def _row(typing: Any, how: Any, codes: Any, table: Any, out: Any, at: Any) -> Any:
    """Write a row.

    Parameters
    ----------
    how : str
        Bits of a code, bits of a number, and what is not plain.
    at : (byte of the row, blocks of it, where in `out` it starts)
        In numbers of 32 bits.
    """
    del typing
    return types.void(how, codes, table, out, at), _write_row


def _write_row(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Vectors(context, builder, signature, arguments)
    bits, step, kind = int(v.said(0)[0]), 32 // int(v.said(0)[1]), v.said(0)[2]
    codes, table, out = (v.array(place) for place in (1, 2, 3))
    first, blocks, place = (v.value(4, i) for i in range(3))
    each = lane_codes(bits)
    with v.loop(blocks) as block:
        held = words(v, codes, builder.add(first, builder.mul(block, LONG(block_bytes(bits)))), bits)
        start = builder.add(place, builder.mul(block, LONG(each // step * LANES)))
        for turn, code in enumerate(range(0, each, step)):
            found = [level(v, table, held, code + i, (bits, kind)) for i in range(step)]
            v.store(_paired(v, found) if step == 2 else found[0], v.at(out, builder.add(start, LONG(turn * LANES))))
    return context.get_dummy_value()


def _paired(v: Vectors, found: list[Any]) -> Any:
    """Return the lower halves of one vector and the upper halves of another."""
    one, other = (v.builder.bitcast(part, INTS) for part in found)
    low, high = (v.builder.and_(part, v.all(INT(mask))) for part, mask in ((one, LOW), (other, HIGH)))
    return v.either(low, high)


@cache
def spread(bits: int, half: bool, kind: str = PLAIN) -> Any:
    """Return the kernel for codes of so many bits, to float32 or to 16 bits; `kind` as of `levels.multiply`."""
    made = how(bits, 16 if half else 32, kind, sources=(lanes.__file__, levels.__file__))
    each = lane_codes(bits) * LANES // (2 if half else 1)

    @numba.njit(nogil=True, boundscheck=False, cache=True)
    def spread(codes: Any, stride: Any, table: Any, out: Any, rows: Any) -> None:
        """Write rows.

        Parameters
        ----------
        codes : uint8 (rows of `stride` bytes and a block more,)
        table : float32
            See `levels.table_of`; for 16 bits: of up to 4 bits, each number twice, in both halves of 32 bits.
        out : float32 (rows, numbers) or int32 (rows, pairs of numbers)
            Of whole blocks.
        rows : (first, last)
            Of the codes; the first goes to the first of `out`.
        """
        for i in range(rows[0], rows[1]):
            place = (i - rows[0]) * out.shape[1]
            _row(made, codes, table, out, (i * stride, out.shape[1] // each, place))

    return spread
