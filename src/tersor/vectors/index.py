"""Compressed vector sets with FAISS verbs: train, add, search, reconstruct, and stand-alone codes.

A set is a list of encoded blocks of rows that share the trained tables. Search multiplies queries with the codes
(`Encoded.matmul`), block by block, and keeps a running top k; queries stay float32 (asymmetric distances).

Any number of threads may read and write one index. A reader takes what is held at that moment, which never changes;
writers encode side by side and replace it one after another.
"""

from __future__ import annotations

import contextlib
import math
import operator
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, final

import numpy as np
import torch
from torch import Tensor

from tersor import api
from tersor.codecs import Centered
from tersor.contract.codec import Codec, Encoded
from tersor.contract.operator import like
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.payload.blocks import Tables
from tersor.vectors import rowwise
from tersor.vectors.choice import TRELLIS, choose
from tersor.vectors.held import Held
from tersor.vectors.nearest import WORST
from tersor.vectors.scoring import best_of

METRICS = ("l2", "ip", "cosine")
BLOCK_ROWS = 8192  # vectors of a block; with the queries of a chunk, their scores stay in the processor's cache
BLOCK_ELEMENTS = 1 << 24  # most elements of a block
CHUNK_QUERIES = 256
TRAIN_VECTORS = 1 << 16  # drawn from a larger training set, or 64 a codeword where that is more
LIMIT = 2.0**50  # largest magnitude of a number: squared distances stay within float32
NAME = "vectors{:09d}"


@final
class Index:
    """A compressed set of vectors. Threads may share it: a search sees the vectors of the moment at which it begins.

    Parameters
    ----------
    dim : int
        Numbers of a vector.
    codec : str or Codec
        A family (`index_families()`), a factory string such as `"rot,sym16"` or `"opqt,pq5x256t"`, or a codec. It must
        encode each row by itself.
    rate : float or None
        Ceiling in bits per element of a stand-alone code; None means 2.0 for a family, and whatever it takes for a
        concrete codec.
    seed : int
        Steers training and the encoder's search.
    effort : str
        `"fast"`, `"normal"` or `"best"`: how long encoding may take, where the family `trellis` chooses the codec.

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

    def __init__(self, dim: SupportsIndex, codec: str | Codec = TRELLIS, rate: float | None = None,
                 seed: SupportsIndex = 0, effort: str = "normal") -> None:
        self.dim = _integer(dim, "dim", 1)
        self.seed = _integer(seed, "seed", 0)
        self.codec = choose(self.dim, codec, rate, effort)
        self._layout = self.codec.layout((1, self.dim))
        shared = {name for name, spec in self._layout.items() if spec.shared}
        self._untaught = isinstance(self.codec, Centered) and shared <= set(self.codec.own((1, self.dim)))
        self._rows = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // self.dim))
        self._held = Held()
        self._writing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_writing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _writing=threading.Lock())

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return self._held.count

    @property
    def code_size(self) -> int:
        """Bytes of a stand-alone code: the codec's payload of one vector, each tensor padded to whole bytes."""
        return rowwise.code_size(self.codec, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes stored, measured: the payload of all blocks, and the tables once. Not the norms kept for search."""
        return self._nbytes(self._held)

    @property
    def rate(self) -> float:
        """Bits per element, everything stored counted; NaN for an empty index."""
        held = self._held
        return 8.0 * self._nbytes(held) / (held.count * self.dim) if held.blocks else math.nan

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added: the codec has no shared tables, or they are trained."""
        return self._trained(self._held)

    def __repr__(self) -> str:
        trained = "" if self.is_trained else ", not trained"
        return f"Index({self.dim}, '{self.codec}': {self.ntotal} vectors of {self.code_size} bytes{trained})"

    def train(self, x: Tensor | np.ndarray) -> None:
        """Train the codec's shared tables on vectors (n, dim); does nothing but check them if there are none.

        Of more than 65,536 vectors, or 64 a codeword, so many are drawn.

        Raises
        ------
        CodecConfigError
            If there are fewer vectors than codewords, or the index already holds vectors.
        NonFiniteError
            If a number is NaN, infinite or beyond 2**50.
        """
        x = self._vectors(x)
        if len(self._own) == len(self._layout):
            return
        if not len(x):
            raise CodecConfigError("index: training needs vectors, found none")
        self._check_empty(self._held)
        tables = self._learned(x)
        with self._writing:
            self._check_empty(self._held)  # others may have added meanwhile
            self._held = Held(tables)

    def add(self, x: Tensor | np.ndarray) -> None:
        """Encode vectors (n, dim), any float dtype; their ids go on from `ntotal`. All or, on an error, none.

        Where all that a codec learns is the vectors' mean, and nothing has been trained, it is that of the first ones.

        Raises
        ------
        CodecConfigError
            If the index is not trained, or is trained anew while vectors are encoded, or the width is not `dim`.
        NonFiniteError
            If a number is NaN, infinite or beyond 2**50.
        """
        x = self._vectors(x)
        held = self._begun(x)
        added = list(self._encoded(x, held))
        with self._writing:
            if self._held.tables is not held.tables:
                raise CodecConfigError("index: it was trained anew while vectors were encoded; add them again")
            self._held = self._held.plus(added, self._rows)

    def search(self, queries: Tensor | np.ndarray, k: SupportsIndex = 10, metric: str = "l2") -> tuple[Any, Any]:
        """Return the k best vectors of each query.

        The first search by L2 or cosine keeps the norms of the decoded vectors: 4 bytes a vector in memory, not stored.

        Parameters
        ----------
        queries : Tensor or ndarray
            (q, dim), any float dtype; computed in float32.
        k : int
        metric : str
            `"l2"`: squared distance, ascending; `"ip"`: scalar product, `"cosine"`: of unit vectors, both descending.

        Returns
        -------
        distances, ids : Tensor, or ndarray where the queries are one
            float32 and int64 (q, k). Of equal scores the lower id comes first. Where k exceeds `ntotal`, the id is -1
            and the distance the largest float32 (the lowest, descending).

        Raises
        ------
        CodecConfigError
            If the index is empty, the width is not `dim`, or k or the metric is unsound.
        NonFiniteError
            If a query holds NaN, infinity or numbers beyond 2**50.
        """
        given, queries = queries, self._vectors(queries).to(torch.float32)
        held, k = self._held, _integer(k, "k", 1)
        if not held.blocks:
            raise CodecConfigError("index: it is empty; add vectors before searching")
        if metric not in METRICS:
            raise CodecConfigError(f"index: metric must be one of {METRICS}, found {metric!r}")
        most = min(k, held.count)
        chunks = [best_of(held, queries[i : i + CHUNK_QUERIES], most, metric)
                  for i in range(0, max(1, len(queries)), CHUNK_QUERIES)]
        missing = (0, k - most)
        distances = torch.nn.functional.pad(torch.cat([c[0] for c in chunks]), missing,
                                            value=WORST if metric == "l2" else -WORST)
        ids = torch.nn.functional.pad(torch.cat([c[1] for c in chunks]), missing, value=-1)
        return like(given, distances), like(given, ids)

    def reconstruct(self, ids: Tensor | np.ndarray | Sequence[int] | int) -> Any:
        """Return the decoded vectors of `ids`, integers of any shape: float32 (*ids.shape, dim), an array for an array.

        Raises
        ------
        CodecConfigError
            If an id is not that of a vector, -1 included.
        """
        index, held = _as_tensor(ids, "ids"), self._held
        if not index.numel():
            index = index.to(torch.int64)  # an empty list has no dtype of its own
        if index.is_floating_point() or index.dtype == torch.bool:
            raise CodecConfigError(f"index: ids must be integers, found {index.dtype}")
        flat = index.reshape(-1).to("cpu", torch.int64)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < held.count:
            raise CodecConfigError(f"index: ids must lie in [0, {held.count}), found {int(flat.min())}.."
                                   f"{int(flat.max())}; -1 in a search result stands for no vector")
        out = torch.empty(flat.numel(), self.dim)
        for first, block in held.placed():
            inside = ((flat >= first) & (flat < first + len(block))).nonzero().squeeze(1)
            if inside.numel():
                out[inside] = block.encoded.gather(flat[inside] - first)
        return like(ids, out.reshape(*index.shape, self.dim))

    def sa_encode(self, x: Tensor | np.ndarray) -> Any:
        """Return stand-alone codes of vectors (n, dim): uint8 (n, code_size), an array for an array.

        Raises what `add` raises.
        """
        parts = [torch.empty(0, self.code_size, dtype=torch.uint8)]
        for encoded in self._encoded(self._vectors(x), self._held):
            parts.append(rowwise.to_bytes(encoded))
        return like(x, torch.cat(parts))

    def sa_decode(self, codes: Tensor | np.ndarray) -> Any:
        """Return the vectors of stand-alone codes, uint8 (n, code_size): float32 (n, dim), an array for an array.

        Raises
        ------
        CodecConfigError
            If the index is not trained, or dtype or shape are not those of codes.
        CorruptStoreError
            If the codes decode to NaN or infinity.
        """
        held = self._held
        self._check_trained(held)
        given, codes = codes, _as_tensor(codes, "codes").cpu()
        if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != self.code_size:
            raise CodecConfigError(f"index: codes must be uint8 (n, {self.code_size}), found {codes.dtype} "
                                   f"{tuple(codes.shape)}")
        out = torch.empty(len(codes), self.dim)
        for start in range(0, len(codes), self._rows):
            part = codes[start : start + self._rows]
            encoded = rowwise.from_bytes(part, self.codec, self.dim, held.tables)
            out[start : start + len(part)] = encoded.check("codes").decode()
        return like(given, out)

    def save(self, path: str | Path) -> None:
        """Write the index to a new directory with `tersor.save`: one matrix a block, the tables once.

        Raises
        ------
        CodecConfigError
            If the index is empty.
        FileExistsError
            If `path` exists.
        """
        held = self._held
        if not held.blocks:
            raise CodecConfigError("index: it is empty; add vectors before saving")
        api.save(path, {NAME.format(first): block.encoded for first, block in held.placed()})

    @classmethod
    def load(cls, path: str | Path, seed: int = 0) -> Index:
        """Read what `save` wrote; every tensor is verified.

        Raises
        ------
        CorruptStoreError, UnknownCodecError
            If anything differs from what was written, or it is no index.
        """
        found = api.load(path)
        blocks = {} if isinstance(found, Encoded) else {name: found[name] for name in sorted(found)}
        first = next(iter(blocks.values()), None)
        if first is None:
            raise CorruptStoreError(f"{path}: not an index; use tersor.load for a matrix")
        index = cls(first.shape[1], first.codec, seed=seed)
        tables = {name: first.tensors[name] for name, spec in index._layout.items() if spec.shared}
        held = Held(tables)
        for name, block in blocks.items():
            same = block.codec == first.codec and block.shape[1] == index.dim
            if not same or name != NAME.format(held.count) or not all(
                    torch.equal(block.tensors[key], table) for key, table in tables.items()):
                raise CorruptStoreError(f"{path}: '{name}' does not continue the index; the store holds other matrices")
            held = held.plus([block], 0)  # blocks as they were saved
        index._held = held
        return index

    @property
    def _own(self) -> list[str]:
        """Names of the tensors that each vector has a part of, in the order of the layout."""
        return [name for name, spec in self._layout.items() if not spec.shared]

    @property
    def _tables(self) -> Tables:
        """The trained tables."""
        return self._held.tables

    @property
    def _blocks(self) -> list[Encoded]:
        """The blocks of vectors, encoded."""
        return [block.encoded for block in self._held.blocks]

    def _begun(self, x: Tensor) -> Held:
        """Return what is held, trained on the first vectors if a mean is all that there is to train."""
        held = self._held
        if not self._untaught or self._trained(held) or not len(x):
            return held
        tables = self._learned(x)
        with self._writing:
            if not self._trained(self._held):  # others may have been first
                self._held = Held(tables)
            return self._held

    def _learned(self, x: Tensor) -> Tables:
        """Return tables trained on vectors, or on so many drawn from them."""
        most = max(TRAIN_VECTORS, 64 * max((spec.levels or 0) for spec in self._layout.values()))
        if len(x) > most:
            drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:most]
            x = x[drawn.sort().values]
        return dict(self.codec.train([x.to(torch.float32)], seed=self.seed))

    def _nbytes(self, held: Held) -> int:
        own = sum(block.encoded.tensors[name].nbytes for block in held.blocks for name in self._own)
        return own + sum(table.nbytes for table in held.tables.values())

    def _vectors(self, x: Tensor | np.ndarray) -> Tensor:
        """Return checked vectors; none at all are as good as any."""
        if isinstance(x, (Tensor, np.ndarray)) and tuple(x.shape) == (0, self.dim):
            return torch.empty(0, self.dim, dtype=torch.float32)
        x = api.as_matrix(x).cpu()
        if x.shape[1] != self.dim:
            raise CodecConfigError(f"index: vectors must be (n, {self.dim}), found {tuple(x.shape)}")
        peak = max(float(x.max()), -float(x.min()))
        if peak > LIMIT:
            raise NonFiniteError(f"index: vectors hold magnitudes up to {peak:.3g}, whose squared distances may "
                                 f"overflow float32; scale them below {LIMIT:.3g}")
        return x

    def _trained(self, held: Held) -> bool:
        return len(self._own) + len(held.tables) == len(self._layout)

    def _check_trained(self, held: Held) -> None:
        if not self._trained(held):
            raise CodecConfigError(f"index: codec '{self.codec}' is not trained; call train(x) first")

    def _check_empty(self, held: Held) -> None:
        if held.blocks:
            raise CodecConfigError(f"index: its {held.count} vectors are encoded with the present tables; train a new "
                                   "index and add them again")

    def _encoded(self, x: Tensor, held: Held) -> Iterator[Encoded]:
        self._check_trained(held)
        for start in range(0, len(x), self._rows):
            yield self.codec.encode(x[start : start + self._rows], seed=self.seed, tables=held.tables)


def _integer(value: SupportsIndex, name: str, least: int) -> int:
    """Return an argument as an int, NumPy's integers too."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, (bool, np.bool_)) and operator.index(value) >= least:
            return operator.index(value)
    wanted = "a positive integer" if least else "an integer >= 0"
    raise CodecConfigError(f"index: {name} must be {wanted}, found {value!r}")


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CodecConfigError(f"index: {name} must be a tensor or an array: {error}") from error
