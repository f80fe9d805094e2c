"""What an index holds at one moment: tables and blocks that are never changed, only replaced by others.

Whoever reads takes them once and sees one state to the end, however many vectors are added meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from tersor.codecs import Centered
from tersor.contract.codec import Encoded
from tersor.numerics.kmeans import times_power
from tersor.ops.sign_scan import Lines, Rows
from tersor.payload.blocks import Tables, row_blocks
from tersor.payload.scales import reciprocal, rms
from tersor.vectors import rowwise
from tersor.vectors.signs import Signs


class Block:
    """Encoded vectors, and what searches have needed of them: kept, neither stored nor counted.

    Threads that ask at once compute the same.

    Parameters
    ----------
    encoded : Encoded

    Attributes
    ----------
    core : Encoded
        The vectors less their mean, where the codec takes one away.
    mean : Tensor or None
        float32 (dim,).
    """

    def __init__(self, encoded: Encoded) -> None:
        codec = encoded.codec
        self.encoded = encoded
        self.core = codec.child(encoded) if isinstance(codec, Centered) else encoded
        self.mean = encoded.tensors["mean"] if isinstance(codec, Centered) else None
        self._norms: dict[bool, Tensor] = {}
        self._signs: Signs | None = None

    def __len__(self) -> int:
        return self.encoded.shape[0]

    def norms(self, *, core: bool = False) -> Tensor:
        """Return the norms of decoded vectors, less their mean or not, float32 (n,)."""
        core = core and self.mean is not None
        found = self._norms.get(core)
        if found is None:
            encoded = self.core if core else self.encoded
            found = torch.cat([rms(encoded.codec.decode_rows(encoded, rows)) for rows in row_blocks(encoded.shape)])
            found.mul_(math.sqrt(encoded.shape[1]))
            self._norms[core] = found
        return found

    def scanned(self, first: int, metric: str, size: int) -> Rows:
        """Return the block as a scan reads it.

        Parameters
        ----------
        first : int
            The id of its first vector.
        metric : str
            Scores are inner products of what the mean leaves, such products less half the squared norm, or cosines,
            whose offsets are the inverse norms: the mean's share in them.
        size : int
            Vectors are divided by `2**size`.
        """
        if self._signs is None:
            self._signs = Signs(self.core)
        factors = self._signs.scales
        if metric == "l2":
            factors, offsets = times_power(factors, -size), times_power(self.norms(core=True), -size).square() / -2
        elif metric == "cosine":
            offsets = reciprocal(self.norms())
            factors = factors * offsets
        else:
            factors = times_power(factors, -size)
            offsets = torch.zeros_like(factors)
        return Rows(self._signs.words, factors.contiguous(), offsets, first)


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Trained tables, and blocks of vectors that are encoded with them, in the order of their ids.

    Attributes
    ----------
    lines : dict
        What scans have needed, by metric: the size that vectors were divided by, and the lines.
    """

    tables: Tables = dataclasses.field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    lines: dict[str, tuple[int, Lines]] = dataclasses.field(default_factory=dict, repr=False)

    @cached_property
    def count(self) -> int:
        """Number of vectors."""
        return sum(len(block) for block in self.blocks)

    @cached_property
    def longest(self) -> float:
        """The largest norm of a decoded vector, less its mean where there is one."""
        return max(float(block.norms(core=True).max()) for block in self.blocks)

    def scanned(self, metric: str, size: int) -> Lines:
        """Return all blocks as a scan reads them, kept for every metric until another size is asked for."""
        found = self.lines.get(metric)
        if found is None or found[0] != size:
            pieces = tuple(block.scanned(first, metric, size) for first, block in self.placed())
            self.lines[metric] = found = size, Lines(pieces)
        return found[1]

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
