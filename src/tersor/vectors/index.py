"""Compressed vector sets with FAISS verbs: train, add, remove, search, reconstruct, and stand-alone codes.

A set is a list of encoded blocks of rows that share the trained tables. Search meets codes with queries block by block,
and keeps a running top k; queries stay float32 (asymmetric distances).

Any number of threads may read and write one index. A reader takes what is held at that moment, which never changes;
writers encode side by side and replace it one after another.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, SupportsIndex, final

import numpy as np
import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded
from tersor.contract.operator import like
from tersor.errors import CodecConfigError
from tersor.families import AUTO
from tersor.payload.blocks import Tables
from tersor.vectors import rowwise, saving
from tersor.vectors.checks import METRICS, Ids, device_of, ids_of, integer, new_ids, vectors_of
from tersor.vectors.deciding import decided
from tersor.vectors.held import Block, Held
from tersor.vectors.lists import SAMPLES, Lists
from tersor.vectors.reading import Reader

TRAIN_VECTORS = 1 << 16  # drawn from a larger training set, or 64 a codeword or a list where that is more

__all__ = ["METRICS", "Index"]


@final
class Index(Reader):
    """A compressed set of vectors. Threads may share it: a search sees the vectors of the moment at which it begins.

    Parameters
    ----------
    dim : int
        Numbers of a vector.
    codec : str or Codec
        A family (`index_families()`), perhaps with a rate (`"trellis2.5"`), a factory string such as `"rot,sym16"` or
        `"opqt,pq5x256t"`, or a codec. It must encode each row by itself. `"IVF1024,"` before it makes 1,024 lists.
        `"auto"` is chosen when vectors are first seen, and stays: `spectral`, `rq` or `trellis`, whichever errs least
        on some of them that are set aside, tables weighed. Until then, and where `effort` is `"fast"`, it is `trellis`.
    rate : float or None
        Ceiling in bits per element of a stand-alone code; None means 2.0 for a family, and whatever it takes for a
        concrete codec.
    seed : int
        Steers training and the encoder's search.
    effort : str
        `"fast"`, `"normal"` or `"best"`: how long encoding may take, where `trellis` or `auto` chooses the codec.
    metric : str
        `"l2"`, `"ip"` or `"cosine"`: of searches that name none. Codes do not depend on it.

    Raises
    ------
    BudgetError
        If the rate is too low, above 32 or no number; names the least.
    CodecConfigError, UnknownCodecError
        If the codec is not row-wise, does not admit the width, or is unknown.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    >>> index = Index(32, codec="rot,lm4")
    >>> index.add(x)
    >>> index.search(x[:3], k=1)[1].flatten().tolist()
    [0, 1, 2]
    """

    def __init__(self, dim: SupportsIndex, codec: str | Codec = AUTO, rate: float | None = None,
                 seed: SupportsIndex = 0, effort: str = "normal", metric: str = "l2") -> None:
        super().__init__(dim, codec, rate, seed, effort, metric)
        self._journal: saving.Journal | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_journal": None}  # a copy is another index

    def train(self, x: Tensor | np.ndarray, total: SupportsIndex | None = None) -> None:
        """Train lists and the codec's shared tables on vectors (n, dim); only checks them if there are none.

        Of more than 65,536 vectors, or 64 a codeword or a list, so many are drawn. The family `auto` chooses its codec.

        Parameters
        ----------
        x : Tensor or ndarray
        total : int or None
            Vectors that the index will hold, if more than these: `auto` weighs tables by it.

        Raises
        ------
        CodecConfigError
            If there are fewer vectors than codewords or lists, or the index already holds vectors.
        NonFiniteError
            If a number is NaN, infinite or beyond 2**50.
        """
        x = vectors_of(x, self.dim)
        if len(self._own) == len(self._layout) and not self.nlist:
            return
        if not len(x):
            raise CodecConfigError("index: training needs vectors, found none")
        self._check_empty(self._held)
        learned = self._learned(x, len(x) if total is None else integer(total, "total", 1))
        with self._writing:
            self._check_empty(self._held)  # others may have added meanwhile
            if not self._open and learned[0] != self.codec:
                raise CodecConfigError("index: another thread trained it meanwhile; train it once")
            self._begin(learned)

    def add(self, x: Tensor | np.ndarray) -> None:
        """Encode vectors (n, dim), any float dtype; ids go on from the largest so far. All or, on an error, none.

        Where all that a codec learns is the vectors' mean, and nothing has been trained, it is that of the first ones.

        Raises
        ------
        CodecConfigError
            If the index is not trained, or is trained anew while vectors are encoded, or the width is not `dim`.
        NonFiniteError
            If a number is NaN, infinite or beyond 2**50.
        """
        self._add(vectors_of(x, self.dim), None)

    def add_with_ids(self, x: Tensor | np.ndarray, ids: Ids) -> None:
        """Encode vectors as `add` does, under ids of their own: integers (n,), not negative, new and all different."""
        x = vectors_of(x, self.dim)
        self._add(x, new_ids(ids, len(x)))

    def remove_ids(self, ids: Ids) -> int:
        """Remove the vectors of ids, integers of any shape; return how many there were. Others keep their ids.

        Ids that the index does not have are passed over, as in FAISS: compare the number that is returned.
        """
        gone = ids_of(ids).reshape(-1)

        def change(held: Held) -> tuple[Held, Mapping[str, Tensor], int]:
            keep = ~torch.isin(held.ids, gone)
            return held.without(keep), {saving.IDS: gone}, held.count - int(keep.sum())

        return self._changed("remove", change)

    def reset(self) -> None:
        """Remove all vectors; what was trained stays, and ids begin anew."""
        self._changed("reset", lambda held: (Held(held.tables, (), held.lists), {}, held.count))

    def to(self, device: str | torch.device) -> Self:
        """Let searches run on a device from now on, and vectors be encoded there; return this index, as modules do.

        Verbs, ids and files stay what they are. The codes stay in memory, and searches keep a copy of them on the
        device: what a scan reads, and 25 bytes a vector for ids, places, norms and scales. The first search after a
        change makes the copy anew. `"cpu"` gives the device's memory back. Training stays on the processor, and what is
        decoded without being searched, as by `reconstruct` or `refine=`.

        Parameters
        ----------
        device : str or torch.device
            `"cpu"`, `"cuda"` or `"cuda:1"`.

        Raises
        ------
        CodecConfigError
            If torch finds no such device, or it is of another kind.
        """
        found = device_of(device)
        with self._writing:
            if found != self._device:
                self._held, self._device = self._held.bare(), found
        return self

    def emptied(self) -> Self:
        """Return an index without vectors, of the same settings and training: parts that will be merged start so."""
        other = copy.copy(self)
        other._held = Held(self._held.tables, (), self._held.lists)
        return other

    def merge(self, other: Index) -> None:
        """Add the vectors of an index that was trained with this one (`emptied`, `shard`, copies); ids stay.

        Raises
        ------
        CodecConfigError
            If it was trained apart, so that its codes mean something else, or has ids of this one.
        """
        if not isinstance(other, Index):
            raise CodecConfigError(f"index: another index expected, found {type(other).__name__}")
        theirs = other._held.whole()

        def change(held: Held) -> tuple[Held, Mapping[str, Tensor], int]:
            if other.codec != self.codec or not held.is_kin(theirs):
                raise CodecConfigError("index: it was trained apart from the other, so codes of one say nothing in the "
                                       "other; train once, and start parts from emptied()")
            held.check_new(theirs.ids)
            blocks = [block.loaded() for block in theirs.blocks] if theirs.mapped else list(theirs.blocks)
            return held.plus(blocks, self._rows), saving.change_of(blocks) if self._journal else {}, theirs.count

        if other.dim != self.dim:
            raise CodecConfigError(f"index: its vectors have {self.dim} numbers, and those of the other {other.dim}")
        if theirs.blocks:
            self._changed("add", change)

    def shard(self, count: SupportsIndex) -> list[Self]:
        """Return so many indexes with a share of the vectors each, in order; ids stay. `merge` joins them again."""
        held, parts = self._held.whole(), integer(count, "count", 1)
        edges = [i * held.count // parts for i in range(parts + 1)]
        found = []
        for first, last in itertools.pairwise(edges):
            one, keep = self.emptied(), torch.zeros(held.count, dtype=torch.bool)
            keep[first:last] = True
            one._held = held.without(keep)
            found.append(one)
        return found

    def sa_encode(self, x: Tensor | np.ndarray) -> Any:
        """Return stand-alone codes of vectors (n, dim): uint8 (n, code_size), an array for an array.

        Raises what `add` raises, and refuses with lists: a code says nothing without its list.
        """
        self._check_alone(self._held)
        parts = [torch.empty(0, self.code_size, dtype=torch.uint8)]
        for block in self._encoded(vectors_of(x, self.dim), self._held, None):
            parts.append(rowwise.to_bytes(block.encoded))
        return like(x, torch.cat(parts))

    def save(self, path: str | Path) -> None:
        """Write the index to a new directory, which appears whole or not at all: one matrix a block, the tables once.

        Raises
        ------
        CodecConfigError
            If the index is empty.
        FileExistsError
            If `path` exists.
        """
        held = self._held.whole()
        if not held.blocks:
            raise CodecConfigError("index: it is empty; add vectors before saving")
        saving.write(Path(path), held, {"metric": self.metric, "lists": self.nlist, "seed": self.seed,
                                        "nprobe": self._nprobe})

    @classmethod
    def load(cls, path: str | Path, seed: int | None = None, *, mapped: bool = False) -> Self:
        """Read what `save` wrote, and what was changed since through `open`; every tensor is verified.

        What is changed afterwards stays in memory. `mapped` leaves the codes in their files: a search lays out one
        block at a time and keeps none, so it takes longer. Memory then holds ids and norms, 12 to 16 bytes a vector;
        otherwise nothing depends on the files any more.

        Raises
        ------
        CorruptStoreError, UnknownCodecError
            If anything differs from what was written, or it is no index. Of a mapped index every verb but `reset`
            raises the first where a file has become shorter meanwhile.
        """
        index = cls._opened(Path(path), seed, mapped)
        index._journal = None
        return index

    @classmethod
    def open(cls, path: str | Path, seed: int | None = None) -> Self:
        """Read an index as `load` does, and write every change to the journal in its directory before it is seen.

        A change is whole on the disk, or it has not happened. One process may write and any number read; they see what
        others have written after `refresh`. `save` to a new directory makes an index without a journal.

        Raises what `load` raises.
        """
        return cls._opened(Path(path), seed, mapped=False)

    @classmethod
    def _opened(cls, path: Path, seed: int | None, mapped: bool) -> Self:
        codec, held, settings = saving.read(path, mapped=mapped)
        lists = f"IVF{settings['lists']}," if settings.get("lists") else ""
        index = cls(len(held.tables.get("mean", ())) or held.blocks[0].encoded.shape[1], f"{lists}{codec}",
                    seed=settings.get("seed", 0) if seed is None else seed, metric=settings.get("metric", "l2"))
        index._held = dataclasses.replace(held, following=max(held.following, settings.get("following", 0)), made={})
        index.nprobe = settings.get("nprobe", index.nprobe)
        index._journal = saving.Journal(path)
        index.refresh()
        return index

    def refresh(self) -> int:
        """Take over what others have written to the journal of an opened index; return the number of changes.

        Raises
        ------
        CodecConfigError
            If the index was not opened from a directory.
        CorruptStoreError
            If a change is missing or damaged; those before it have been taken over.
        """
        if self._journal is None:
            raise saving.no_journal()
        with self._writing:
            before = self._journal.count
            for verb, tensors in self._journal.following():
                self._held = saving.applied(self._held, verb, tensors, self.codec, (self._rows, self.dim))
            return self._journal.count - before

    def _add(self, x: Tensor, ids: Tensor | None) -> None:
        held = self._begun(x)
        if ids is not None:
            held.check_new(ids)
        added = list(self._encoded(x, held, ids))

        def change(now: Held) -> tuple[Held, Mapping[str, Tensor], int]:
            if now.tables is not held.tables or now.lists is not held.lists:
                raise CodecConfigError("index: it was trained anew while vectors were encoded; add them again")
            if ids is None:
                self._number(added, now.following)
            else:
                now.check_new(ids)
            return now.plus(added, self._rows), saving.change_of(added) if self._journal else {}, len(x)

        if added:
            self._changed("add", change)

    @staticmethod
    def _number(blocks: list[Block], first: int) -> None:
        """Give new vectors the next ids."""
        for block in blocks:
            block.ids = torch.arange(first, first + len(block))
            first += len(block)

    def _changed(self, verb: str, change: Callable[[Held], tuple[Held, Mapping[str, Tensor], int]]) -> int:
        """Replace what is held, after the change is in the journal, if there is one; return a number that it gives."""
        with self._writing:
            after, tensors, number = change(self._held if verb == "reset" else self._held.whole())
            if self._journal is not None:
                self._journal.append(verb, tensors)
            self._held = after
        return number

    def _begun(self, x: Tensor) -> Held:
        """Return what is held, trained on the first vectors if a mean is all that there is to train."""
        held = self._held
        if not self._untaught or self._trained(held) or not len(x):
            return held
        learned = self._learned(x, len(x))
        with self._writing:
            if not self._trained(self._held):  # others may have been first
                self._begin(learned)
            return self._held

    def _begin(self, learned: tuple[Codec, Tables, Lists | None]) -> None:
        """Take over what was learned."""
        codec, tables, lists = learned
        self._settle(codec)
        self._held, self._open = Held(tables, (), lists), False

    def _learned(self, x: Tensor, total: int) -> tuple[Codec, Tables, Lists | None]:
        """Return the codec, and tables and lists trained on vectors, or on so many drawn from them."""
        count = max(total, len(x))
        most = max(TRAIN_VECTORS, SAMPLES * max((spec.levels or 0) for spec in self._layout.values()),
                   SAMPLES * self.nlist)
        if len(x) > most:
            drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:most]
            x = x[drawn.sort().values]
        wide, lists = x.to(torch.float32), None
        if self.nlist:
            lists = Lists.trained(wide, self.nlist, self.seed)
            wide = wide - lists.centroids[lists.of(wide)]
        if self._open:
            return *decided(wide, count, *self._asked, self.seed), lists
        return self.codec, dict(self.codec.train([wide], seed=self.seed)), lists

    def _coded(self, part: Tensor, tables: Tables) -> Encoded:
        """Return encoded vectors, on the processor wherever they are encoded."""
        there = {name: table.to(self._device) for name, table in tables.items()}
        encoded = self.codec.encode(part.to(self._device), seed=self.seed, tables=there).to("cpu")
        return dataclasses.replace(encoded, tensors={**encoded.tensors, **tables})

    def _check_empty(self, held: Held) -> None:
        if held.blocks:
            raise CodecConfigError(f"index: its {held.count} vectors are encoded with the present tables; train a new "
                                   "index and add them again")

    def _encoded(self, x: Tensor, held: Held, ids: Tensor | None) -> Iterator[Block]:
        """Yield encoded vectors; without ids, numbered from 0."""
        self._check_trained(held)
        for start in range(0, len(x), self._rows):
            part, places = x[start : start + self._rows], None
            if held.lists is not None:
                part = part.to(torch.float32)
                places = held.lists.of(part)
                part, places = part - held.lists.centroids[places], places.to(torch.int32)
            encoded = self._coded(part, held.tables)
            own = torch.arange(start, start + len(part)) if ids is None else ids[start : start + self._rows]
            yield Block(encoded, own, places, held.lists)
