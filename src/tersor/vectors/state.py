"""What an index is, whatever is done with it: its codec, its metric, and what it holds at this moment."""

from __future__ import annotations

import math
import threading
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from tersor.codecs import Centered
from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError
from tersor.families import AUTO
from tersor.vectors import rowwise
from tersor.vectors.checks import CPU, integer, metric_of
from tersor.vectors.choice import choose, without_lists
from tersor.vectors.deciding import is_open
from tersor.vectors.held import Held
from tersor.vectors.lists import MOST_LISTS

BLOCK_ROWS = 8192  # vectors of a block; with the queries of a chunk, their scores stay in the processor's cache
BLOCK_ELEMENTS = 1 << 24  # most elements of a block
MOST_NUMBERS = 1 << 20  # of a vector


class State:
    """The settings of an index, and what it holds; parameters are those of `Index`."""

    def __init__(self, dim: SupportsIndex, codec: str | Codec, rate: float | None, seed: SupportsIndex, effort: str,
                 metric: str) -> None:
        self.dim = integer(dim, "dim", 1)
        if self.dim > MOST_NUMBERS:
            raise CodecConfigError(f"index: dim must be at most {MOST_NUMBERS:,}, found {self.dim}")
        self.seed = integer(seed, "seed", 0)
        self.metric = metric_of(metric)
        self.nlist, codec, rate = without_lists(codec, rate)
        if self.nlist > MOST_LISTS:
            raise CodecConfigError(f"index: at most {MOST_LISTS} lists, found {self.nlist}")
        self._asked = rate, effort
        self._open = codec == AUTO and is_open(self.dim, rate, effort)
        self._settle(choose(self.dim, codec, rate, effort))
        shared = {name for name, spec in self._layout.items() if spec.shared}
        around = isinstance(self.codec, Centered) and shared <= set(self.codec.own((1, self.dim)))
        self._untaught = around and not self.nlist
        self._rows = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // self.dim))
        self._held = Held()
        self._nprobe = max(1, round(math.sqrt(self.nlist)))
        self._device = CPU
        self._writing = threading.Lock()

    def _settle(self, codec: Codec) -> None:
        """Take a codec: while none is chosen, vectors have not been seen, and none is held."""
        self.codec, self._layout = codec, codec.layout((1, self.dim))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_writing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _writing=threading.Lock())

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return self._held.count

    def __len__(self) -> int:
        return self._held.count

    def __bool__(self) -> bool:
        return True  # also where it is empty: it is an index

    @property
    def device(self) -> torch.device:
        """Where searches run, and codes are made; see `to`."""
        return self._device

    @property
    def ids(self) -> Tensor:
        """Ids of all vectors, in the order in which they were added, int64 (ntotal,)."""
        return self._held.ids.clone()

    @property
    def nprobe(self) -> int:
        """Lists that a search looks into, where there are lists; the root of their number unless it is set."""
        return self._nprobe

    @nprobe.setter
    def nprobe(self, count: SupportsIndex) -> None:
        self._nprobe = integer(count, "nprobe", 1)

    @property
    def code_size(self) -> int:
        """Bytes of a stand-alone code: the codec's payload of one vector, each tensor padded to whole bytes."""
        return rowwise.code_size(self.codec, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes stored, measured: codes, tables, centroids, each vector's list, and ids that are no running numbers.

        Not what searches keep in memory besides.
        """
        return self._held.nbytes(self._own)

    @property
    def table_bytes(self) -> int:
        """Bytes of `nbytes` that all vectors share: tables and centroids."""
        held = self._held
        return sum(table.nbytes for table in held.tables.values()) + (held.lists.nbytes if held.lists else 0)

    @property
    def rate(self) -> float:
        """Bits per element, everything stored counted; NaN for an empty index."""
        held = self._held
        return 8.0 * held.nbytes(self._own) / (held.count * self.dim) if held.blocks else math.nan

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added: the codec has no shared tables, or they are trained; so are lists."""
        return self._trained(self._held)

    def __repr__(self) -> str:
        trained = "" if self.is_trained else ", not trained"
        lists = f"{self.nlist} lists of " if self.nlist else ""
        there = "" if self._device == CPU else f", on {self._device}"
        return (f"Index({self.dim}, {lists}'{self.codec}': {self.ntotal} vectors of {self.code_size} bytes, by "
                f"{self.metric}{there}{trained})")

    @property
    def _own(self) -> list[str]:
        """Names of the tensors that each vector has a part of, in the order of the layout."""
        return [name for name, spec in self._layout.items() if not spec.shared]

    def _trained(self, held: Held) -> bool:
        return len(self._own) + len(held.tables) == len(self._layout) and bool(self.nlist) == (held.lists is not None)

    def _check_trained(self, held: Held) -> None:
        if not self._trained(held):
            lists = f" with {self.nlist} lists" if self.nlist else ""
            raise CodecConfigError(f"index: codec '{self.codec}'{lists} is not trained; call train(x) first")

    def _check_filled(self, held: Held) -> None:
        if not held.blocks:
            raise CodecConfigError("index: it is empty; add vectors before searching")
        held.whole()


def nothing(count: int, k: int, worst: float) -> tuple[Tensor, Tensor]:
    """Return distances and ids of no vectors."""
    return torch.full((count, k), worst), torch.full((count, k), -1, dtype=torch.int64)
