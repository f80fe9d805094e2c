"""IQ3_XXS: 3.0625 bits; 256 words of 4 magnitudes, an even number of minus signs in 8, a scale of 4 bits for 32."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields
from tersor.gguf.types.bits import half_bytes, halves
from tersor.gguf.types.words import WordType, from_packed_words, packed_words, signs_of


@dataclasses.dataclass(frozen=True)
class IQ3XXS(WordType):
    """See the module."""

    name: str = "IQ3_XXS"
    number: int = 18
    file_type: int = 23
    block: int = 256
    nbytes: int = 98
    sub: int = 32
    levels: tuple[int, ...] = (4, 12, 20, 28, 36, 44, 52, 62)
    scales: tuple[int, int] | None = (1, 31)
    even: bool = True
    share: float = 0.25

    def pack(self, fields: Fields) -> Tensor:
        """See `CodedType.pack`."""
        assert fields.scales is not None
        return torch.cat([half_bytes(fields.d), self.indices(fields.codes).to(torch.uint8),
                          packed_words(signs_of(fields.codes), fields.scales)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `CodedType.unpack`."""
        d, words, held = stored.split((2, 64, 32), 1)
        signs, scales = from_packed_words(held)
        return Fields(self.levels_of(words, signs.to(torch.uint8)), halves(d), scales)
