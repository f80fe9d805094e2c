"""Q5_0: 5.5 bits; 32 codes of 5 bits with one scale."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread


@dataclasses.dataclass(frozen=True)
class Q50(ScalarType):
    """See the module."""

    name: str = "Q5_0"
    number: int = 6
    file_type: int = 8
    block: int = 32
    nbytes: int = 22
    sub: int = 32
    levels: tuple[int, ...] = tuple(range(-16, 16))

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        high, low = gather(fields.codes >> 4, 4, 1, 1), gather(fields.codes & 15, 1, 16, 4)
        return torch.cat([half_bytes(fields.d), high, low], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, high, low = stored.split((2, 4, 16), 1)
        return Fields(spread(low, 1, 16, 4) | spread(high, 4, 1, 1) << 4, halves(d))
