"""Q8_0: 8.5 bits; 32 codes of 8 bits with one scale."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import half_bytes, halves


@dataclasses.dataclass(frozen=True)
class Q80(ScalarType):
    """See the module."""

    name: str = "Q8_0"
    number: int = 8
    file_type: int = 7
    block: int = 32
    nbytes: int = 34
    sub: int = 32
    levels: tuple[int, ...] = tuple(range(-128, 128))

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        return torch.cat([half_bytes(fields.d), fields.codes ^ 128], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, codes = stored.split((2, 32), 1)
        return Fields(codes ^ 128, halves(d))
