"""Compressed vector sets with FAISS verbs: train, add, search, reconstruct, and stand-alone codes.

A set is a list of encoded blocks of rows that share the trained tables. Search multiplies queries with the codes
(`Encoded.matmul`), block by block, and keeps a running top k; queries stay float32 (asymmetric distances).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tersor import api
from tersor.contract.codec import Codec, Encoded
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.payload.blocks import Tables, row_blocks
from tersor.vectors import rowwise
from tersor.vectors.choice import choose
from tersor.vectors.nearest import WORST, Best

METRICS = ("l2", "ip", "cosine")
BLOCK_ROWS = 8192  # vectors of a block; with the queries of a chunk, their scores stay in the processor's cache
BLOCK_ELEMENTS = 1 << 24  # most elements of a block
CHUNK_QUERIES = 256
TRAIN_VECTORS = 1 << 16  # drawn from a larger training set, or 64 a codeword where that is more
LIMIT = 2.0**50  # largest magnitude of a number: squared distances stay within float32
NAME = "vectors{:09d}"


@final
class Index:
    """A compressed set of vectors.

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

    def __init__(self, dim: int, codec: str | Codec = "qet_plus", rate: float | None = None, seed: int = 0) -> None:
        if not isinstance(dim, int) or dim < 1:
            raise CodecConfigError(f"index: dim must be a positive integer, found {dim!r}")
        if not isinstance(seed, int) or seed < 0:
            raise CodecConfigError(f"index: seed must be an integer >= 0, found {seed!r}")
        self.dim, self.seed = dim, seed
        self.codec = choose(dim, codec, rate)
        self._layout = self.codec.layout((1, dim))
        self._tables: Tables = {}
        self._blocks: list[Encoded] = []
        self._powers: list[Tensor | None] = []  # squared norms of decoded vectors, by block, once they were needed
        self._rows = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // dim))

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return sum(block.shape[0] for block in self._blocks)

    @property
    def code_size(self) -> int:
        """Bytes of a stand-alone code: the codec's payload of one vector, each tensor padded to whole bytes."""
        return rowwise.code_size(self.codec, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes stored, measured: the payload of all blocks, and the tables once. Not the norms kept for search."""
        own = sum(block.tensors[name].nbytes for block in self._blocks for name in self._own)
        return own + sum(table.nbytes for table in self._tables.values())

    @property
    def rate(self) -> float:
        """Bits per element, everything stored counted; NaN for an empty index."""
        return 8.0 * self.nbytes / (self.ntotal * self.dim) if self._blocks else math.nan

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added: the codec has no shared tables, or they are trained."""
        return len(self._own) + len(self._tables) == len(self._layout)

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
        if self._blocks:
            raise CodecConfigError(f"index: its {self.ntotal} vectors are encoded with the present tables; train a new "
                                   "index and add them again")
        most = max(TRAIN_VECTORS, 64 * max((spec.levels or 0) for spec in self._layout.values()))
        if len(x) > most:
            drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:most]
            x = x[drawn.sort().values]
        self._tables = dict(self.codec.train([x.to(torch.float32)], seed=self.seed))

    def add(self, x: Tensor | np.ndarray) -> None:
        """Encode vectors (n, dim), any float dtype; their ids go on from `ntotal`. All or, on an error, none.

        Raises
        ------
        CodecConfigError
            If the index is not trained, the width is not `dim`, or there is no vector.
        NonFiniteError
            If a number is NaN, infinite or beyond 2**50.
        """
        for block in list(self._encoded(self._vectors(x))):
            self._append(block)

    def search(self, queries: Tensor | np.ndarray, k: int = 10, metric: str = "l2") -> tuple[Tensor, Tensor]:
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
        distances, ids : Tensor
            float32 and int64 (q, k). Of equal scores the lower id comes first. Where k exceeds `ntotal`, the id is -1
            and the distance the largest float32 (the lowest, descending).

        Raises
        ------
        CodecConfigError
            If the index is empty, the width is not `dim`, or k or the metric is unsound.
        NonFiniteError
            If a query holds NaN, infinity or numbers beyond 2**50.
        """
        queries = self._vectors(queries).to(torch.float32)
        if not self._blocks:
            raise CodecConfigError("index: it is empty; add vectors before searching")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise CodecConfigError(f"index: k must be a positive integer, found {k!r}")
        if metric not in METRICS:
            raise CodecConfigError(f"index: metric must be one of {METRICS}, found {metric!r}")
        most = min(k, self.ntotal)
        chunks = [self._search(queries[i : i + CHUNK_QUERIES], most, metric)
                  for i in range(0, len(queries), CHUNK_QUERIES)]
        missing = (0, k - most)
        distances = torch.nn.functional.pad(torch.cat([c[0] for c in chunks]), missing,
                                            value=WORST if metric == "l2" else -WORST)
        return distances, torch.nn.functional.pad(torch.cat([c[1] for c in chunks]), missing, value=-1)

    def reconstruct(self, ids: Tensor | np.ndarray | Sequence[int] | int) -> Tensor:
        """Return the decoded vectors of `ids`, integers of any shape: float32 (*ids.shape, dim).

        Raises
        ------
        CodecConfigError
            If an id is not that of a vector, -1 included.
        """
        index = _as_tensor(ids, "ids")
        if index.is_floating_point() or index.dtype == torch.bool:
            raise CodecConfigError(f"index: ids must be integers, found {index.dtype}")
        flat = index.reshape(-1).to("cpu", torch.int64)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.ntotal:
            raise CodecConfigError(f"index: ids must lie in [0, {self.ntotal}), found {int(flat.min())}.."
                                   f"{int(flat.max())}; -1 in a search result stands for no vector")
        out = torch.empty(flat.numel(), self.dim)
        for first, block in self._placed():
            inside = ((flat >= first) & (flat < first + block.shape[0])).nonzero().squeeze(1)
            if inside.numel():
                out[inside] = block.gather(flat[inside] - first)
        return out.reshape(*index.shape, self.dim)

    def sa_encode(self, x: Tensor | np.ndarray) -> Tensor:
        """Return stand-alone codes of vectors (n, dim): uint8 (n, code_size). Raises what `add` raises."""
        parts = []
        for encoded in self._encoded(self._vectors(x)):
            parts.append(rowwise.to_bytes(encoded))
        return torch.cat(parts)

    def sa_decode(self, codes: Tensor | np.ndarray) -> Tensor:
        """Return the vectors of stand-alone codes, uint8 (n, code_size): float32 (n, dim).

        Raises
        ------
        CodecConfigError
            If the index is not trained, or dtype or shape are not those of codes.
        CorruptStoreError
            If the codes decode to NaN or infinity.
        """
        self._check_trained()
        codes = _as_tensor(codes, "codes").cpu()
        if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != self.code_size:
            raise CodecConfigError(f"index: codes must be uint8 (n, {self.code_size}), found {codes.dtype} "
                                   f"{tuple(codes.shape)}")
        out = torch.empty(len(codes), self.dim)
        for start in range(0, len(codes), self._rows):
            part = codes[start : start + self._rows]
            encoded = rowwise.from_bytes(part, self.codec, self.dim, self._tables)
            out[start : start + len(part)] = encoded.check("codes").decode()
        return out

    def save(self, path: str | Path) -> None:
        """Write the index to a new directory with `tersor.save`: one matrix a block, the tables once.

        Raises
        ------
        CodecConfigError
            If the index is empty.
        FileExistsError
            If `path` exists.
        """
        if not self._blocks:
            raise CodecConfigError("index: it is empty; add vectors before saving")
        api.save(path, {NAME.format(first): block for first, block in self._placed()})

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
        index._tables = {name: first.tensors[name] for name, spec in index._layout.items() if spec.shared}
        for name, block in blocks.items():
            same = block.codec == first.codec and block.shape[1] == index.dim
            if not same or name != NAME.format(index.ntotal) or not all(
                    torch.equal(block.tensors[key], table) for key, table in index._tables.items()):
                raise CorruptStoreError(f"{path}: '{name}' does not continue the index; the store holds other matrices")
            own = {key: block.tensors[key] for key in index._own}
            index._blocks.append(Encoded(block.codec, block.shape, {**own, **index._tables}))
            index._powers.append(None)
        return index

    @property
    def _own(self) -> list[str]:
        """Names of the tensors that each vector has a part of, in the order of the layout."""
        return [name for name, spec in self._layout.items() if not spec.shared]

    def _vectors(self, x: Tensor | np.ndarray) -> Tensor:
        x = api.as_matrix(x).cpu()
        if x.shape[1] != self.dim:
            raise CodecConfigError(f"index: vectors must be (n, {self.dim}), found {tuple(x.shape)}")
        peak = max(float(x.max()), -float(x.min()))
        if peak > LIMIT:
            raise NonFiniteError(f"index: vectors hold magnitudes up to {peak:.3g}, whose squared distances may "
                                 f"overflow float32; scale them below {LIMIT:.3g}")
        return x

    def _check_trained(self) -> None:
        if not self.is_trained:
            raise CodecConfigError(f"index: codec '{self.codec}' is not trained; call train(x) first")

    def _encoded(self, x: Tensor) -> Iterator[Encoded]:
        self._check_trained()
        for start in range(0, len(x), self._rows):
            yield self.codec.encode(x[start : start + self._rows], seed=self.seed, tables=self._tables)

    def _placed(self) -> Iterator[tuple[int, Encoded]]:
        """Yield each block with the id of its first vector."""
        first = 0
        for block in self._blocks:
            yield first, block
            first += block.shape[0]

    def _append(self, block: Encoded) -> None:
        """Append a block, merged with the last ones while they are no larger: many small adds make few blocks."""
        while self._blocks and self._blocks[-1].shape[0] <= min(block.shape[0], self._rows - block.shape[0]):
            self._powers.pop()
            block = rowwise.joined(self._blocks.pop(), block)
        own = {name: block.tensors[name] for name in self._own}
        self._blocks.append(Encoded(self.codec, block.shape, {**own, **self._tables}))
        self._powers.append(None)

    def _power(self, number: int) -> Tensor:
        """Return the squared norms of a block's decoded vectors, float32 (n,), kept."""
        held = self._powers[number]
        if held is None:
            block = self._blocks[number]
            held = torch.cat([block.codec.decode_rows(block, rows).square().sum(1) for rows in row_blocks(block.shape)])
            self._powers[number] = held
        return held

    def _search(self, queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
        norms = queries.square().sum(1, keepdim=True)
        if metric == "cosine":
            queries = queries / norms.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        best = Best(len(queries), k)
        for number, (first, block) in enumerate(self._placed()):
            scores = block.matmul(queries)
            if metric == "l2":  # |q - x|² = |q|² - 2 (q x - |x|² / 2)
                scores.sub_(self._power(number) / 2)
            elif metric == "cosine":
                power = self._power(number)
                scores.mul_(torch.where(power > 0, power.rsqrt(), torch.zeros_like(power)))
            best.offer(scores, first)
        return (norms - 2 * best.scores).clamp_min_(0) if metric == "l2" else best.scores, best.ids


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CodecConfigError(f"index: {name} must be a tensor or an array: {error}") from error
