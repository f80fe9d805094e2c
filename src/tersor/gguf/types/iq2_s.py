"""IQ2_S: 2.5625 bits; 1024 words of 8 magnitudes, 8 signs, a scale of 4 bits for 16."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields
from tersor.gguf.types.bits import gather, half_bytes, halves, spread
from tersor.gguf.types.words import WordType, signs_of


@dataclasses.dataclass(frozen=True)
class IQ2S(WordType):
    """See the module."""

    name: str = "IQ2_S"
    number: int = 22
    file_type: int = 28
    block: int = 256
    nbytes: int = 82
    sub: int = 16
    levels: tuple[int, ...] = (8, 25, 43)
    scales: tuple[int, int] | None = (1, 31)
    share: float = 0.125

    def pack(self, fields: Fields) -> Tensor:
        """See `CodedType.pack`."""
        assert fields.scales is not None
        words = self.indices(fields.codes)
        return torch.cat([half_bytes(fields.d), (words & 255).to(torch.uint8), signs_of(fields.codes).to(torch.uint8),
                          gather(words >> 8, 8, 1, 2), gather(fields.scales, 8, 1, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `CodedType.unpack`."""
        d, low, signs, high, scales = stored.split((2, 32, 32, 8, 8), 1)
        words = low.to(torch.int32) | spread(high, 8, 1, 2).to(torch.int32) << 8
        return Fields(self.levels_of(words, signs), halves(d), spread(scales, 8, 1, 4).to(torch.int32))
