"""Q5_1: 6 bits; 32 codes of 5 bits with a scale and a minimum."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread


@dataclasses.dataclass(frozen=True)
class Q51(ScalarType):
    """See the module; ggml adds the stored minimum, so its sign is turned here."""

    name: str = "Q5_1"
    number: int = 7
    file_type: int = 9
    block: int = 32
    nbytes: int = 24
    sub: int = 32
    levels: tuple[int, ...] = tuple(range(32))
    shifted: bool = True

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        assert fields.dmin is not None
        return torch.cat([half_bytes(fields.d), half_bytes(-fields.dmin), gather(fields.codes >> 4, 4, 1, 1),
                          gather(fields.codes & 15, 1, 16, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, least, high, low = stored.split((2, 2, 4, 16), 1)
        return Fields(spread(low, 1, 16, 4) | spread(high, 4, 1, 1) << 4, halves(d), dmin=-halves(least))
