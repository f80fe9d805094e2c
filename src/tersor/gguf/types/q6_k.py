"""Q6_K: 6.5625 bits; 16 sub-blocks of 16 codes of 6 bits, with scales of 8 bits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread


@dataclasses.dataclass(frozen=True)
class Q6K(ScalarType):
    """See the module."""

    name: str = "Q6_K"
    number: int = 14
    file_type: int = 18
    block: int = 256
    nbytes: int = 210
    sub: int = 16
    levels: tuple[int, ...] = tuple(range(-32, 32))
    scales: tuple[int, int] | None = (-128, 127)

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        assert fields.scales is not None
        scales = fields.scales.to(torch.int8).contiguous().view(torch.uint8)
        return torch.cat([gather(fields.codes & 15, 2, 64, 4), gather(fields.codes >> 4, 2, 32, 2), scales,
                          half_bytes(fields.d)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        low, high, scales, d = stored.split((128, 64, 16, 2), 1)
        return Fields(spread(low, 2, 64, 4) | spread(high, 2, 32, 2) << 4, halves(d),
                      scales.contiguous().view(torch.int8))
