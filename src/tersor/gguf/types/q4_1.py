"""Q4_1: 5 bits; 32 codes of 4 bits with a scale and a minimum."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import Fields, ScalarType
from tersor.gguf.types.bits import gather, half_bytes, halves, spread


@dataclasses.dataclass(frozen=True)
class Q41(ScalarType):
    """See the module; ggml adds the stored minimum, so its sign is turned here."""

    name: str = "Q4_1"
    number: int = 3
    file_type: int = 3
    block: int = 32
    nbytes: int = 20
    sub: int = 32
    levels: tuple[int, ...] = tuple(range(16))
    shifted: bool = True

    def pack(self, fields: Fields) -> Tensor:
        """See `ScalarType.pack`."""
        assert fields.dmin is not None
        return torch.cat([half_bytes(fields.d), half_bytes(-fields.dmin), gather(fields.codes, 1, 16, 4)], 1)

    def unpack(self, stored: Tensor) -> Fields:
        """See `ScalarType.unpack`."""
        d, least, codes = stored.split((2, 2, 16), 1)
        return Fields(spread(codes, 1, 16, 4), halves(d), dmin=-halves(least))
