"""Numbers as they are: F32, F16 and BF16."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.types.base import BlockType


@dataclasses.dataclass(frozen=True)
class Plain(BlockType):
    """A type whose blocks are single numbers.

    Attributes
    ----------
    dtype : torch.dtype
    """

    dtype: torch.dtype

    def decode(self, stored: Tensor) -> Tensor:
        """See `BlockType.decode`."""
        return stored.contiguous().view(self.dtype).to(torch.float32)


F32 = Plain("F32", 0, 0, 1, 4, torch.float32)
F16 = Plain("F16", 1, 1, 1, 2, torch.float16)
BF16 = Plain("BF16", 30, 32, 1, 2, torch.bfloat16)
PLAIN = {kind.dtype: kind for kind in (F32, F16, BF16)}
