"""IQ4_NL: 4.5 bits; 32 codes of 4 bits that stand for 16 uneven levels, with one scale."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread

UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclasses.dataclass(frozen=True)
class IQ4NL(ScalarType):
    """See the module."""

    name: str = "IQ4_NL"
    number: int = 20
    file_type: int = 25
    block: int = 32
    nbytes: int = 18
    sub: int = 32
    levels: tuple[int, ...] = UNEVEN

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        return torch.cat([half_bytes(fields.d), gather(fields.codes, 1, 16, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, codes = stored.split((2, 16), 1)
        return Fields(spread(codes, 1, 16, 4), halves(d))
