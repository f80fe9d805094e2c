"""What an index holds at one moment: tables and blocks that are never changed, only replaced by others.

Whoever reads takes them once and sees one state to the end, however many vectors are added meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tersor.contract.codec import Encoded
from tersor.payload.blocks import Tables, row_blocks
from tersor.payload.scales import rms
from tersor.vectors import rowwise


class Block:
    """Encoded vectors, and the norms of what they decode to once a search has needed them.

    Parameters
    ----------
    encoded : Encoded
    """

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded
        self._norms: Tensor | None = None

    def __len__(self) -> int:
        return self.encoded.shape[0]

    def norms(self) -> Tensor:
        """Return the norms, float32 (n,), kept; threads that ask at once compute the same."""
        found = self._norms
        if found is None:
            codec, encoded = self.encoded.codec, self.encoded
            found = torch.cat([rms(codec.decode_rows(encoded, rows)) for rows in row_blocks(encoded.shape)])
            found.mul_(math.sqrt(encoded.shape[1]))
            self._norms = found
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Trained tables, and blocks of vectors that are encoded with them, in the order of their ids."""

    tables: Tables = dataclasses.field(default_factory=dict)
    blocks: tuple[Block, ...] = ()

    @property
    def count(self) -> int:
        """Number of vectors."""
        return sum(len(block) for block in self.blocks)

    def placed(self) -> Iterator[tuple[int, Block]]:
        """Yield each block with the id of its first vector."""
        first = 0
        for block in self.blocks:
            yield first, block
            first += len(block)

    def plus(self, added: Iterable[Encoded], rows: int) -> Held:
        """Return this with more vectors, encoded with the same tables, in blocks of at most `rows`.

        A block is merged with the last ones while they are no larger: many small adds make few blocks.
        """
        blocks = list(self.blocks)
        for encoded in added:
            while blocks and len(blocks[-1]) <= min(encoded.shape[0], rows - encoded.shape[0]):
                encoded = rowwise.joined(blocks.pop().encoded, encoded)
            blocks.append(Block(self._with_tables(encoded)))
        return Held(self.tables, tuple(blocks))

    def _with_tables(self, encoded: Encoded) -> Encoded:
        """Return encoded vectors that share the tables held."""
        return dataclasses.replace(encoded, tensors={**encoded.tensors, **self.tables})
