"""Bits on the processor, copied so that they begin with a byte."""

from __future__ import annotations

from typing import Any

from tersor.numerics.machine import njit


@njit()
def realigned(codes: Any, firsts: Any, count: Any, out: Any, place: Any) -> None:
    """Write `count` bits of every row to byte `place` of its row of `out`.

    Parameters
    ----------
    codes : uint8
    firsts : int64 (rows,)
        Bits of `codes` at which rows begin.
    out : uint8 (rows, bytes)
        What follows the bits in their last byte is arbitrary.
    """
    nbytes = (count + 7) // 8
    for row in range(firsts.shape[0]):
        byte, shift = firsts[row] >> 3, firsts[row] & 7
        for i in range(nbytes):
            held = codes[byte + i] >> shift
            if shift and byte + i + 1 < codes.shape[0]:
                held |= codes[byte + i + 1] << (8 - shift)
            out[row, place + i] = held & 255
