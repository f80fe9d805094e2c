"""Q4_K: 4.5 bits; 8 sub-blocks of 32 codes of 4 bits, with scales and minima of 6 bits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import from_six_bits, gather, half_bytes, halves, six_bits, spread


@dataclasses.dataclass(frozen=True)
class Q4K(ScalarType):
    """See the module."""

    name: str = "Q4_K"
    number: int = 12
    file_type: int = 15
    block: int = 256
    nbytes: int = 144
    sub: int = 32
    levels: tuple[int, ...] = tuple(range(16))
    scales: tuple[int, int] | None = (0, 63)
    mins: tuple[int, int] | None = (0, 63)
    shifted: bool = True

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        scales, dmin, mins = fields.shifted()
        return torch.cat([half_bytes(fields.d), half_bytes(dmin), six_bits(scales, mins),
                          gather(fields.codes, 4, 32, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, dmin, both, codes = stored.split((2, 2, 12, 128), 1)
        scales, mins = from_six_bits(both)
        return Fields(spread(codes, 4, 32, 4), halves(d), scales, halves(dmin), mins)
