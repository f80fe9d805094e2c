"""IQ3_S: 3.4375 bits; 512 words of 4 magnitudes, 8 signs, a scale of 4 bits for 32."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields
from tersor.gguf.types.bits import gather, half_bytes, halves, spread
from tersor.gguf.types.words import WordType, signs_of


@dataclasses.dataclass(frozen=True)
class IQ3S(WordType):
    """See the module."""

    name: str = "IQ3_S"
    number: int = 21
    file_type: int = 26
    block: int = 256
    nbytes: int = 110
    sub: int = 32
    levels: tuple[int, ...] = tuple(range(1, 16, 2))
    scales: tuple[int, int] | None = (1, 31)

    def pack(self, fields: Fields) -> Tensor:
        """See `CodedType.pack`."""
        assert fields.scales is not None
        words = self.indices(fields.codes)
        return torch.cat([half_bytes(fields.d), (words & 255).to(torch.uint8), gather(words >> 8, 8, 1, 1),
                          signs_of(fields.codes).to(torch.uint8), gather(fields.scales, 4, 1, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `CodedType.unpack`."""
        d, low, high, signs, scales = stored.split((2, 64, 8, 32, 4), 1)
        words = low.to(torch.int32) | spread(high, 8, 1, 1).to(torch.int32) << 8
        return Fields(self.levels_of(words, signs), halves(d), spread(scales, 4, 1, 4).to(torch.int32))
