"""What an index holds at one moment: tables and blocks that are never changed, only replaced by others.

Whoever reads takes them once and sees one state to the end, however many vectors are added or removed meanwhile.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from tersor.codecs import Bounded, Centered
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.payload.blocks import Tables, row_blocks
from tersor.payload.layout import packed_nbytes
from tersor.payload.scales import rms
from tersor.vectors import rowwise
from tersor.vectors.lists import Lists
from tersor.vectors.mapping import MappedFiles
from tersor.vectors.scanned import Meeting


class Block:
    """Encoded vectors, and what searches have needed of them: kept, neither stored nor counted.

    Threads that ask at once compute the same.

    Parameters
    ----------
    encoded : Encoded
    ids : Tensor
        int64 (n,).
    places : Tensor or None
        The list of each vector, int32 (n,); None without lists.
    lists : Lists or None

    Attributes
    ----------
    core : Encoded
        The vectors less their mean, where the codec takes one away.
    mean : Tensor or None
        float32 (dim,).
    """

    def __init__(self, encoded: Encoded, ids: Tensor, places: Tensor | None = None,
                 lists: Lists | None = None) -> None:
        self.encoded, self.ids, self.places, self._lists = encoded, ids, places, lists
        inner = encoded.codec.child(encoded) if isinstance(encoded.codec, Bounded) else encoded
        codec = inner.codec
        self.core = codec.child(inner) if isinstance(codec, Centered) else inner
        self.mean = inner.tensors["mean"] if isinstance(codec, Centered) else None
        self._norms: dict[bool, Tensor] = {}
        self.made: dict[Any, Any] = {}

    def __len__(self) -> int:
        return self.encoded.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what searches have made, some of it on devices; norms stay, as they take long."""
        return {**vars(self), "made": {}}

    def on(self, device: torch.device) -> Block:
        """Return the same vectors on a device, kept there."""
        if device == self.ids.device:
            return self
        found = self.made.get(device)
        if found is None:
            places, lists = self.places, self._lists
            found = Block(self.encoded.to(device), self.ids.to(device), None if places is None else places.to(device),
                          None if lists is None else lists.on(device))
            self.made[device] = found
        for around in self._norms.keys() - found._norms.keys():
            found._norms[around] = self._norms[around].to(device)
        return found

    @cached_property
    def span(self) -> tuple[int, int] | None:
        """First id and the one after the last, where ids are running numbers; else None."""
        first, count = int(self.ids[0]), len(self)
        runs = int(self.ids[-1]) == first + count - 1 and bool((self.ids[1:] > self.ids[:-1]).all())
        return (first, first + count) if runs else None

    @property
    def id_bytes(self) -> int:
        """Bytes that ids take where they are stored: none for running numbers."""
        return 0 if self.span else self.ids.nbytes

    def norms(self, *, around: bool = False) -> Tensor:
        """Return the norms of decoded vectors, or of their distance to the mean, or to the lists' origin: float32."""
        around = around and (self.mean is not None or self._lists is not None)
        found = self._norms.get(around)
        if found is None:
            parts = [rms(self._less(rows) if around else self.points(rows)) for rows in row_blocks(self.encoded.shape)]
            self._norms[around] = found = torch.cat(parts).mul_(math.sqrt(self.encoded.shape[1]))
        return found

    def _less(self, rows: slice) -> Tensor:
        if self._lists is None:
            return self.core.codec.decode_rows(self.core, rows)
        return self.points(rows) - self._lists.origin

    def points(self, rows: slice | Tensor) -> Tensor:
        """Return decoded vectors, float32 (k, dim)."""
        found = self.encoded.codec.decode_rows(self.encoded, rows)
        if self._lists is None:
            return found
        assert self.places is not None
        return found + self._lists.centroids[self.places[rows].to(torch.int64)]

    def bare(self) -> Block:
        """Return the same vectors: norms are shared, and what else searches make of them is not."""
        other = Block(self.encoded, self.ids, self.places, self._lists)
        other._norms = self._norms
        return other

    def loaded(self) -> Block:
        """Return the same vectors, with codes in memory of their own."""
        tensors = {name: one.clone() for name, one in self.encoded.tensors.items()}
        return Block(dataclasses.replace(self.encoded, tensors=tensors), self.ids, self.places, self._lists)

    def kept(self, keep: Tensor) -> Block | None:
        """Return the vectors that are kept, bool (n,): this block where all are, None where none is."""
        if bool(keep.all()):
            return self
        if not bool(keep.any()):
            return None
        places = None if self.places is None else self.places[keep]
        return Block(rowwise.chosen(self.encoded, keep), self.ids[keep], places, self._lists)


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Trained tables, and blocks of vectors that are encoded with them, in the order in which they were added.

    Attributes
    ----------
    lists : Lists or None
    following : int
        The next running number: beyond all ids so far, removed ones included.
    mapping : MappedFiles or None
        Files that codes are mapped from: searches lay out one block at a time, and keep none.
    made : dict
        What searches have needed of the whole.
    """

    tables: Tables = dataclasses.field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    lists: Lists | None = None
    following: int = 0
    mapping: MappedFiles | None = None
    made: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what searches have made."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)} | {"made": {}}

    def check_new(self, ids: Tensor) -> None:
        """Raise `CodecConfigError` where an id is that of a vector held."""
        taken = ids[self.places_of(ids) >= 0]
        if len(taken):
            raise CodecConfigError(f"index: it has a vector of id {int(taken[0])}, and of {len(taken) - 1} others "
                                   "named; remove it first, or choose another id")

    def bare(self) -> Held:
        """Return the same vectors without what searches have made, but for norms."""
        return dataclasses.replace(self, blocks=tuple(block.bare() for block in self.blocks), made={})

    @property
    def mapped(self) -> bool:
        """Whether codes lie in mapped files."""
        return self.mapping is not None

    def whole(self) -> Self:
        """Return this, all of which can be read; raise `CorruptStoreError` where a mapped file has become shorter."""
        if self.mapping is not None:
            self.mapping.check()
        return self

    @cached_property
    def count(self) -> int:
        """Number of vectors."""
        return sum(len(block) for block in self.blocks)

    @cached_property
    def longest(self) -> float:
        """The largest norm of a decoded vector, around the mean or the origin where there is one."""
        return max(float(block.norms(around=True).max()) for block in self.blocks)

    @cached_property
    def meeting(self) -> Meeting:
        """How queries meet the codes."""
        return Meeting(self.blocks[0].core)

    @cached_property
    def ids(self) -> Tensor:
        """All ids, in the order in which vectors were added, int64 (n,)."""
        return torch.cat([block.ids for block in self.blocks]) if self.blocks else torch.zeros(0, dtype=torch.int64)

    def points(self, places: Tensor, dim: int) -> Tensor:
        """Return the decoded vectors at some places, float32 (n, dim)."""
        out = torch.empty(len(places), dim)
        for first, block in self.placed():
            inside = ((places >= first) & (places < first + len(block))).nonzero().squeeze(1)
            if inside.numel():
                out[inside] = block.points(places[inside] - first)
        return out

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        return self.ids.sort()

    def nbytes(self, own: Iterable[str]) -> int:
        """Return the bytes stored: of each vector's tensors, ids that are no running numbers, tables and centroids.

        A vector's list takes as many bits as their number needs.
        """
        names = tuple(own)
        parts = sum(block.encoded.tensors[name].nbytes for block in self.blocks for name in names)
        tables = sum(table.nbytes for table in self.tables.values())
        ids = sum(block.id_bytes for block in self.blocks)
        lists = self.lists.nbytes + packed_nbytes(self.count, max(2, len(self.lists))) if self.lists else 0
        return parts + tables + ids + lists

    def places_of(self, ids: Tensor) -> Tensor:
        """Return the place of each id among all vectors, int64; -1 where there is none."""
        if not self.blocks:
            return torch.full_like(ids, -1)
        spans = [block.span for block in self.blocks]
        known_spans = [span for span in spans if span]
        if len(known_spans) == len(spans) and all(a[1] == b[0] for a, b in itertools.pairwise(known_spans)):
            first = known_spans[0][0]
            return torch.where((ids >= first) & (ids < first + self.count), ids - first, -1)
        known, order = self._sorted
        found = torch.searchsorted(known, ids.contiguous()).clamp_max(len(known) - 1)
        return torch.where(known[found] == ids, order[found], -1)

    def placed(self) -> Iterator[tuple[int, Block]]:
        """Yield each block with the place of its first vector."""
        first = 0
        for block in self.blocks:
            yield first, block
            first += len(block)

    def is_kin(self, other: Held) -> bool:
        """Tell whether both have the same tables and lists."""
        mine, theirs = (({} if one.lists is None else {"": one.lists.centroids}) | dict(one.tables)
                        for one in (self, other))
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def plus(self, added: Iterable[Block], rows: int) -> Held:
        """Return this with more vectors, encoded with the same tables, in blocks of at most `rows`.

        A block is merged with the last ones while they are no larger: many small adds make few blocks.
        """
        blocks, following = list(self.blocks), self.following
        for block in added:
            following = max(following, int(block.ids.max()) + 1)
            while blocks and len(blocks[-1]) <= min(len(block), rows - len(block)):
                block = self._joined(blocks.pop(), block)
            blocks.append(Block(self._with_tables(block.encoded), block.ids, block.places, self.lists))
        return self._kept(blocks, following)

    def without(self, keep: Tensor) -> Held:
        """Return this with the vectors that are kept, bool (n,)."""
        found = [block.kept(keep[first : first + len(block)]) for first, block in self.placed()]
        return self._kept([block for block in found if block is not None], self.following)

    def _kept(self, blocks: list[Block], following: int) -> Held:
        after = Held(self.tables, tuple(blocks), self.lists, following, self.mapping)
        if self.blocks and blocks:  # a property that is cached follows from the tables alone
            after.__dict__.update({name: self.__dict__[name] for name in ("meeting",) if name in self.__dict__})
        return after

    def alone(self) -> Iterator[tuple[slice, Held]]:
        """Yield every block with its place among all vectors, as a whole of its own that keeps nothing but norms."""
        for first, block in self.placed():
            one = Held(self.tables, (block.bare(),), self.lists)
            one.__dict__["meeting"] = self.meeting
            yield slice(first, first + len(block)), one

    def _joined(self, head: Block, tail: Block) -> Block:
        places = None
        if head.places is not None and tail.places is not None:
            places = torch.cat([head.places, tail.places])
        return Block(rowwise.joined(head.encoded, tail.encoded), torch.cat([head.ids, tail.ids]), places, self.lists)

    def _with_tables(self, encoded: Encoded) -> Encoded:
        """Return encoded vectors that share the tables held."""
        return dataclasses.replace(encoded, tensors={**encoded.tensors, **self.tables})
