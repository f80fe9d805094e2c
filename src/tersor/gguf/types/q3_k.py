"""Q3_K: 3.4375 bits; 16 sub-blocks of 16 codes of 3 bits, with signed scales of 6 bits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread


@dataclasses.dataclass(frozen=True)
class Q3K(ScalarType):
    """See the module."""

    name: str = "Q3_K"
    number: int = 11
    file_type: int = 12
    block: int = 256
    nbytes: int = 110
    sub: int = 16
    levels: tuple[int, ...] = tuple(range(-4, 4))
    scales: tuple[int, int] | None = (-32, 31)

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        assert fields.scales is not None
        scales = fields.scales.to(torch.int32) + 32
        return torch.cat([gather(fields.codes >> 2, 1, 32, 1), gather(fields.codes & 3, 2, 32, 2),
                          gather(scales & 15, 1, 8, 4), gather(scales >> 4, 1, 4, 2), half_bytes(fields.d)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        high, low, scales_low, scales_high, d = stored.split((32, 64, 8, 4, 2), 1)
        scales = spread(scales_low, 1, 8, 4) | spread(scales_high, 1, 4, 2) << 4
        return Fields(spread(low, 2, 32, 2) | spread(high, 1, 32, 1) << 2, halves(d), scales.to(torch.int32) - 32)
