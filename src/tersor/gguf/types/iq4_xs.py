"""IQ4_XS: 4.25 bits; 8 sub-blocks of 32 codes of 4 bits that stand for 16 uneven levels, with scales of 6 bits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread
from tersor.gguf.types.iq4_nl import UNEVEN


@dataclasses.dataclass(frozen=True)
class IQ4XS(ScalarType):
    """See the module."""

    name: str = "IQ4_XS"
    number: int = 23
    file_type: int = 30
    block: int = 256
    nbytes: int = 136
    sub: int = 32
    levels: tuple[int, ...] = UNEVEN
    scales: tuple[int, int] | None = (-32, 31)

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        assert fields.scales is not None
        scales = fields.scales.to(torch.int32) + 32
        return torch.cat([half_bytes(fields.d), gather(scales >> 4, 2, 1, 2), gather(scales & 15, 4, 1, 4),
                          gather(fields.codes, 8, 16, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, high, low, codes = stored.split((2, 2, 4, 128), 1)
        scales = spread(low, 4, 1, 4) | spread(high, 2, 1, 2) << 4
        return Fields(spread(codes, 8, 16, 4), halves(d), scales.to(torch.int32) - 32)
