"""Codes on the processor, spread out to numbers that matrices are multiplied with.

As in `levels`, codes stay in the order in which they are looked up; vectors are put in that order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
from numba import types
from numba.core.extending import intrinsic

from tersor.ops.codebook_linear.kernels.levels import block_bytes, level, words
from tersor.ops.codebook_linear.shapes.lanes import lane_codes
from tersor.ops.vectors import INT, INTS, LANES, LONG, Vectors

LOW, HIGH = 0x0000FFFF, 0xFFFF0000


def _row(bits: int, half: bool, kind: str) -> Any:
    """Return an intrinsic that writes a row: of float32, or of pairs of numbers of 16 bits."""

    @intrinsic
    def row(typing: Any, codes: Any, first: Any, blocks: Any, table: Any, out: Any, place: Any):
        """Write a row that starts at byte `first` to number `place` of `out`, 32 bits each."""
        del typing
        return types.void(codes, first, blocks, table, out, place), _write

    def _write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature, arguments)
        codes, table, out = (v.array(place) for place in (0, 3, 4))
        _, first, blocks, _, _, place = arguments
        each, step = lane_codes(bits), 2 if half else 1
        with v.loop(blocks) as block:
            held = words(v, codes, builder.add(first, builder.mul(block, LONG(block_bytes(bits)))), bits)
            start = builder.add(place, builder.mul(block, LONG(each // step * LANES)))
            for turn, code in enumerate(range(0, each, step)):
                found = [level(v, table, held, code + i, (bits, kind)) for i in range(step)]
                v.store(_paired(v, found) if half else found[0], v.at(out, builder.add(start, LONG(turn * LANES))))
        return context.get_dummy_value()

    return row


def _paired(v: Vectors, found: list[Any]) -> Any:
    """Return the lower halves of one vector and the upper halves of another."""
    one, other = (v.builder.bitcast(part, INTS) for part in found)
    low, high = (v.builder.and_(part, v.all(INT(mask))) for part, mask in ((one, LOW), (other, HIGH)))
    return v.either(low, high)


@cache
def spread(bits: int, half: bool, kind: str = "") -> Any:
    """Return the kernel for codes of so many bits, to float32 or to 16 bits; `kind` as of `levels.multiply`."""
    row = _row(bits, half, kind)

    @numba.njit(nogil=True, boundscheck=False, cache=True)
    def write(codes: Any, stride: Any, table: Any, out: Any, rows: Any) -> None:
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
        blocks = out.shape[1] // each
        for i in range(rows[0], rows[1]):
            row(codes, i * stride, blocks, table, out, (i - rows[0]) * out.shape[1])

    each = lane_codes(bits) * LANES // (2 if half else 1)
    return write
