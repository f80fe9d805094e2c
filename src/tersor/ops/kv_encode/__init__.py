"""Tokens of keys or values to plain codes, with a scale a token: one launch for all heads of a layer. See README.md."""

from __future__ import annotations

from torch import Tensor

from tersor.ops.dispatch import take_reference
from tersor.ops.kv_encode import reference
from tersor.ops.kv_encode.shapes import refusal, unnamed
from tersor.payload.words import Naming


def kv_encode(states: Tensor, table: Tensor | None, maps: Tensor | None, bits: int, block: int,
              refits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 (blocks, batch, bytes), scales bf16 (blocks, batch, heads block), and a flag int32 (1,).

    Rows of a block lie head-major. A token that is not finite gets the scale NaN, and sets the flag: so nothing waits
    for the device.

    Parameters
    ----------
    states : Tensor
        (batch, heads, blocks block, dim).
    table : Tensor or None
        float32 (2**bits,), ascending, on the device: a token's scale is found by least squares, `refits` times. None:
        numbers of e4m3, the peak of a token at the largest.
    maps : Tensor or None
        float32 (1, dim, dim), orthogonal: tokens are encoded as `maps token`.
    bits : int
        Of a code; 8 without a table.
    """
    if not states.is_cuda or take_reference("kv_encode", refusal(states, bits, block)):
        return reference.encode(states, table, maps, bits, block, refits)
    from tersor.ops.kv_encode import launch

    return launch.encode(states, table, maps, bits, block, refits)


def kv_name(states: Tensor, naming: Naming, block: int) -> tuple[Tensor, Tensor]:
    """Return bytes that name the nearest words, uint8 (blocks, batch, heads block, bytes), and a flag int32 (1,).

    Rows of a block lie head-major. The flag is 1 where a token is not finite.

    Parameters
    ----------
    states : Tensor
        (batch, heads, blocks block, dim).
    naming : Naming
    """
    if not states.is_cuda or take_reference("kv_name", unnamed(states, block)):
        return reference.name(states, naming, block)
    from tersor.ops.kv_encode import launch

    return launch.name(states, naming, block)


__all__ = ["kv_encode", "kv_name"]
