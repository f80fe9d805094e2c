"""IQ2_XXS: 2.0625 bits; 256 words of 8 magnitudes, an even number of minus signs, a scale of 4 bits for 32."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields
from tersor.gguf.types.bits import half_bytes, halves
from tersor.gguf.types.words import WordType, from_packed_words, packed_words, signs_of


@dataclasses.dataclass(frozen=True)
class IQ2XXS(WordType):
    """See the module."""

    name: str = "IQ2_XXS"
    number: int = 16
    file_type: int = 19
    block: int = 256
    nbytes: int = 66
    sub: int = 32
    levels: tuple[int, ...] = (8, 25, 43)
    scales: tuple[int, int] | None = (1, 31)
    even: bool = True
    share: float = 0.125

    def pack(self, fields: Fields) -> Tensor:
        """See `CodedType.pack`."""
        assert fields.scales is not None
        n = len(fields.codes)
        words = self.indices(fields.codes).to(torch.uint8).reshape(n, 8, 4)
        signs = packed_words(signs_of(fields.codes), fields.scales).reshape(n, 8, 4)
        return torch.cat([half_bytes(fields.d), torch.cat([words, signs], 2).reshape(n, 64)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `CodedType.unpack`."""
        d, rest = stored.split((2, 64), 1)
        words, held = rest.reshape(len(stored), 8, 8).split(4, 2)
        signs, scales = from_packed_words(held.reshape(len(stored), 32))
        return Fields(self.levels_of(words.reshape(len(stored), 32), signs.to(torch.uint8)), halves(d), scales)
