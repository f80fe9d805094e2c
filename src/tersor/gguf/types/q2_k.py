"""Q2_K: 2.625 bits; 16 sub-blocks of 16 codes of 2 bits, with scales and minima of 4 bits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread


@dataclasses.dataclass(frozen=True)
class Q2K(ScalarType):
    """See the module."""

    name: str = "Q2_K"
    number: int = 10
    file_type: int = 10
    block: int = 256
    nbytes: int = 84
    sub: int = 16
    levels: tuple[int, ...] = tuple(range(4))
    scales: tuple[int, int] | None = (0, 15)
    mins: tuple[int, int] | None = (0, 15)
    shifted: bool = True

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        scales, dmin, mins = fields.shifted()
        both = scales.to(torch.int32) | mins.to(torch.int32) << 4
        return torch.cat([both.to(torch.uint8), gather(fields.codes, 2, 32, 2), half_bytes(fields.d),
                          half_bytes(dmin)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        both, codes, d, dmin = stored.split((16, 64, 2, 2), 1)
        return Fields(spread(codes, 2, 32, 2), halves(d), both & 15, halves(dmin), both >> 4)
