"""Q5_K: 5.5 bits; 8 sub-blocks of 32 codes of 5 bits, with scales and minima of 6 bits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import from_six_bits, gather, half_bytes, halves, six_bits, spread


@dataclasses.dataclass(frozen=True)
class Q5K(ScalarType):
    """See the module."""

    name: str = "Q5_K"
    number: int = 13
    file_type: int = 17
    block: int = 256
    nbytes: int = 176
    sub: int = 32
    levels: tuple[int, ...] = tuple(range(32))
    scales: tuple[int, int] | None = (0, 63)
    mins: tuple[int, int] | None = (0, 63)
    shifted: bool = True

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        scales, dmin, mins = fields.shifted()
        return torch.cat([half_bytes(fields.d), half_bytes(dmin), six_bits(scales, mins),
                          gather(fields.codes >> 4, 1, 32, 1), gather(fields.codes & 15, 4, 32, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, dmin, both, high, low = stored.split((2, 2, 12, 32, 128), 1)
        scales, mins = from_six_bits(both)
        return Fields(spread(low, 4, 32, 4) | spread(high, 1, 32, 1) << 4, halves(d), scales, halves(dmin), mins)
