"""Karhunen-Loève transform by calibration: rows in a trained basis, bytes spent by reverse water-filling.

Keys and values of one attention head lie close to few directions, and the same ones for any text. A basis, a mean and
codebooks, trained once and shared, leave a row nothing of its own to store but its codes: each byte is a codeword of 1
to 16 components. What attention feels of an error, its queries' second moments, may weigh the basis. Derivation:
docs/codecs/klt.md.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.vector.components import (
    COMPONENTS,
    WORDS,
    Components,
    sizes,
    start_of,
    steps_of,
    water_fill,
    words_of,
)
from tersor.contract.checks import shared_tables
from tersor.contract.codec import Codec, Encoded, Search, Traits
from tersor.contract.coordinates import Coordinates
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.numerics.kmeans import assign
from tersor.numerics.settings import pinned
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.words import Naming, Words

QUAD = 4  # numbers that are looked up together: 16 bytes, the widest element that torch moves at once


@final
@dataclasses.dataclass(frozen=True)
class Klt(Codec):
    """`row = mean + size Σ scale_i c_i basis_i`, components `c` in runs, each the codeword of one byte.

    Mean, basis and scales are those of the row's head: runs of `block` rows belong to heads 0, 1, …, in turn. The
    components beyond the last byte's are dropped.

    Parameters
    ----------
    row_bytes : int
        Bytes a row, its size's included.
    heads : int
    block : int
        Rows of a run; of no meaning with one head.
    sized : bool
        One of the bytes is the row's size, in steps of an eighth of an octave; else the size is 1.
    """

    row_bytes: int
    heads: int = 1
    block: int = 1
    sized: bool = False

    id: ClassVar[str] = "klt"
    grammar: ClassVar[str] = r"klt(?P<bytes>\d{1,6})(?P<sized>s?)(?:h(?P<heads>\d{1,6})x(?P<block>\d{1,9}))?"
    examples: ClassVar[tuple[str, ...]] = ("klt3", "klt4h2x5", "klt4sh2x5")

    def __post_init__(self) -> None:
        for name in ("row_bytes", "heads", "block"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise CodecConfigError(f"klt: {name} must be a positive integer, found {getattr(self, name)!r}")
        if not isinstance(self.sized, bool) or self.row_bytes == self.sized:
            raise CodecConfigError(f"klt: sized must be true or false and leave a byte of {self.row_bytes}, found "
                                   f"{self.sized!r}")
        if self.heads == 1 and self.block != 1:
            raise CodecConfigError(f"klt: with one head, block must be 1, found {self.block}")

    def traits(self) -> Traits:
        """Return that runs of `block` rows are of different heads, where there are several."""
        return Traits(runs=(self.heads, self.block) if self.heads > 1 else None)

    def layout(self, shape: Shape) -> Layout:
        """Return `codes` and the shared `mean`, `basis`, `scale`, `parts` (components of each byte) and `words`.

        Raises
        ------
        CodecConfigError
            If the width is less than the bytes a row.
        """
        rows, width = shape
        if width < self._words:
            raise CodecConfigError(f"codec '{self.spec()}': {self._words} words a row are more than the width "
                                   f"{width}; a component takes a byte at most")
        head = (self.heads, width)
        return {"codes": TensorSpec((rows, self.row_bytes)), "mean": TensorSpec(head, torch.float32, shared=True),
                "basis": TensorSpec((*head, width), torch.float16, shared=True),
                "scale": TensorSpec(head, torch.float32, shared=True),
                "parts": TensorSpec((self._words,), shared=True),
                "words": TensorSpec((WORDS, sum(COMPONENTS)), torch.float16, shared=True)}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Fit the tables to sample matrices, errors unweighted; see `fit`."""
        return self.fit(samples, seed=seed)

    def fit(self, samples: Iterable[Tensor], *, metric: Tensor | None = None,
            weights: Iterable[Tensor] | None = None, seed: int = 0) -> Tables:
        """Fit the tables to sample matrices, each laid out as those to be encoded.

        Parameters
        ----------
        samples : iterable of Tensor
            (rows, width), of one width.
        metric : Tensor or None
            Positive semidefinite, (heads, width, width): what counts is `eᵀ M e` of a row's error e, such as E[q qᵀ] of
            the queries for keys. No unit matters. Default: the identity.
        weights : iterable of Tensor or None
            One number >= 0 a row, (rows,), for each sample: how much its error counts. No unit matters.
        seed : int
            Of k-means.

        Raises
        ------
        CodecConfigError
            If shapes do not fit.
        NonFiniteError
            If numbers are not finite.
        """
        with pinned():
            rows, mass = self._collect(list(samples), None if weights is None else list(weights))
            width = rows[0].shape[1]
            self.layout((1, width))
            if metric is not None and tuple(metric.shape) != (self.heads, width, width):
                raise CodecConfigError(f"klt: the metric must be (heads, width, width) = {(self.heads, width, width)}, "
                                       f"found {tuple(metric.shape)}")
            device = rows[0].device
            eye = torch.eye(width, dtype=torch.float64, device=device)
            heads = [Components(part, share, eye if metric is None else metric[h].to(device, torch.float64),
                                sized=self.sized)
                     for h, (part, share) in enumerate(zip(rows, mass, strict=True))]
            power = torch.stack([head.power for head in heads])
            parts = water_fill(power.sum(0), self._words)
            return {"mean": torch.stack([head.mean for head in heads]).to(torch.float32),
                    "basis": torch.stack([head.basis for head in heads]).to(torch.float16),
                    "scale": power.sqrt().to(torch.float32),
                    "parts": torch.tensor(parts, dtype=torch.uint8, device=device),
                    "words": words_of(heads, parts, seed).to(torch.float16)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Take the rows to components, then the nearest codeword of every run, errors weighed as they count."""
        shape = shape_of(matrix)
        layout = self.layout(shape)
        tables = shared_tables(self.spec(), layout, how.tables, matrix.device)
        codes = torch.empty(layout["codes"].shape, dtype=torch.uint8, device=matrix.device)
        book, scale = _book(tables), tables["scale"]
        analysis = _analysis(self, tables)
        inverse = torch.where(scale > 0, 1.0 / scale.to(torch.float64), 0.0)
        for block in row_blocks(shape):
            head = self._head(block, matrix.device)
            for h in range(self.heads):
                mine = head == h
                plain = (matrix[block][mine].to(torch.float64) - tables["mean"][h].to(torch.float64)) @ analysis[h]
                places = block.start + mine.nonzero().flatten()
                if self.sized:
                    steps = steps_of(plain, scale[h].to(torch.float64).square().mean().sqrt())
                    plain = plain / sizes(steps).unsqueeze(1)
                    codes[places, self._words] = steps
                codes[places, : self._words] = book.encode((plain * inverse[h]).to(torch.float32), scale[h])
        return Encoded(self, shape, {"codes": codes, **tables})

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the components' sums of basis vectors, and the mean."""
        found = self.coordinates(encoded).rows(rows)
        maps, mean = _book(encoded.tensors).maps, encoded.tensors["mean"]
        if self.heads == 1:
            return torch.addmm(mean[0], found, maps[0])
        period = self.heads * self.block
        if isinstance(rows, slice) and rows.start % period == 0 and (rows.stop - rows.start) % period == 0:
            runs = found.reshape(-1, self.heads, self.block, found.shape[1])
            return (runs @ maps).add_(mean.unsqueeze(1)).reshape(-1, encoded.shape[1])
        head = self._head(rows, found.device)
        out = torch.empty(len(head), encoded.shape[1], dtype=torch.float32, device=found.device)
        for h in range(self.heads):
            mine = head == h
            out[mine] = torch.addmm(mean[h], found[mine], maps[h])
        return out

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the codewords, padded to quads."""
        return _Words(self, encoded)

    def spec(self) -> str:
        """Return for example `klt16`, `klt16s` (sized), or `klt16h3x128`: 3 heads in runs of 128 rows."""
        runs = f"h{self.heads}x{self.block}" if self.heads > 1 else ""
        return f"klt{self.row_bytes}{'s' if self.sized else ''}{runs}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `klt` strings; see `spec`."""
        del parts
        heads = int(match["heads"] or 1)
        if match["heads"] and heads == 1:
            raise CodecConfigError("klt: one head is written without 'h1x…'")
        return cls(int(match["bytes"]), heads, int(match["block"] or 1), bool(match["sized"]))

    @property
    def _words(self) -> int:
        """Bytes of a row that are codewords."""
        return self.row_bytes - self.sized

    def _head(self, rows: Rows, device: torch.device) -> Tensor:
        """Return the head of every row."""
        index = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows.to(device)
        return index // self.block % self.heads

    def _collect(self, samples: list[Tensor], weights: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return all rows of each head, and their weights, float64."""
        widths = {sample.shape[1] for sample in samples}
        if len(widths) != 1:
            raise CodecConfigError(f"codec '{self.spec()}': training needs sample matrices of one width, found widths "
                                   f"{sorted(widths)}")
        given = weights if weights is not None else [torch.ones(len(s), device=s.device) for s in samples]
        if [len(w) for w in given] != [len(s) for s in samples] or any(bool((w < 0).any()) for w in given):
            raise CodecConfigError("klt: weights must be one number >= 0 for every row of every sample")
        rows, mass = [], []
        for h in range(self.heads):
            mine = [self._head(slice(0, len(s)), s.device) == h for s in samples]
            rows.append(torch.cat([s[m].to(torch.float64) for s, m in zip(samples, mine, strict=True)]))
            mass.append(torch.cat([w[m].to(torch.float64) for w, m in zip(given, mine, strict=True)]))
            if not bool(torch.isfinite(rows[-1]).all() and torch.isfinite(mass[-1]).all()):
                raise NonFiniteError(f"codec '{self.spec()}': samples or weights hold NaN or infinity")
        return rows, mass


class _Words(Coordinates):
    """Codewords as coordinates: vectors meet the scaled basis of their head, and rows add its mean."""

    def __init__(self, codec: Klt, encoded: Encoded) -> None:
        super().__init__(encoded)
        self._codec, self._book = codec, _book(encoded.tensors)

    def rows(self, rows: Rows) -> Tensor:
        """Return the codewords, (k, n)."""
        words = self._codec.row_bytes - self._codec.sized
        codes = self.encoded.tensors["codes"][rows]
        found = self._book.decode(codes[:, :words])
        return found.mul_(sizes(codes[:, words]).unsqueeze(1)) if self._codec.sized else found

    def words(self) -> Words:
        """Return the words, without padding."""
        book, held = self._book, self.encoded.tensors
        words = torch.cat([book.words[:, start_of(count) : start_of(count) + count] for count in book.parts], 1)
        maps = (held["basis"].to(torch.float32) * held["scale"].unsqueeze(-1))[:, : words.shape[1]]
        known = sizes(torch.arange(WORDS, dtype=torch.uint8, device=words.device)) if self._codec.sized else None
        return Words("codes", book.parts, words, maps.contiguous(), held["mean"], known)

    def naming(self) -> Naming | None:
        """Return what the encoder does as one product and nearest words: numbers are over a byte's largest scale."""
        if self._codec.sized:
            return None
        book, held = self._book, self.encoded.tensors
        words, count = self.words().words, sum(book.parts)
        scale = held["scale"][:, :count].to(torch.float64)
        most = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in scale.split(book.parts, 1)], 1)
        over = torch.where(most > 0, 1.0 / most, 0.0)
        analysis = _analysis(self._codec, held)[:, :, :count] * torch.where(scale > 0, over, 0.0).unsqueeze(1)
        return Naming("codes", held["mean"], analysis.to(torch.float32).contiguous(), words.contiguous(),
                      (scale * over).to(torch.float32), book.parts)

    def into(self, x: Tensor) -> Tensor:
        """Multiply by every head's scaled basis: (..., heads, q, in) to (..., heads, q, n)."""
        return x @ self._book.maps.mT

    def out_of(self, y: Tensor) -> Tensor:
        """Multiply by every head's scaled basis: (..., heads, q, n) to (..., heads, q, in)."""
        return y @ self._book.maps

    def offset(self) -> Tensor | None:
        """Return the means, (heads, 1, in)."""
        return self.encoded.tensors["mean"].unsqueeze(1)


def _analysis(codec: Klt, tables: Tables) -> Tensor:
    """Return what takes rows less their mean to components, float64 (heads, width, width)."""
    analysis, singular = torch.linalg.inv_ex(tables["basis"].to(torch.float64))
    if bool(singular.any()):
        raise CodecConfigError(f"codec '{codec.spec()}': the table 'basis' is singular, so no training made it; "
                               "train the tables again")
    return analysis


class _Book:
    """The codewords of every byte of a row, looked up by quads of numbers.

    Attributes
    ----------
    parts : tuple of int
        Components of each byte, ascending.
    maps : Tensor
        float32 (heads, 4 lookups, width): the scaled basis vector of each number that a row's lookups give, or 0.
    """

    def __init__(self, tensors: Tables) -> None:
        self.words = tensors["words"].to(torch.float32)
        self.parts, width = tuple(tensors["parts"].tolist()), tensors["mean"].shape[1]
        if not set(self.parts) <= set(COMPONENTS) or sum(self.parts) > width or list(self.parts) != sorted(self.parts):
            raise CorruptStoreError(f"klt: bytes of {self.parts} components are not those of rows of {width}")
        quads, self._entries, place = (t.to(self.words.device) for t in _lookups(self.parts, width))
        chosen = torch.nn.functional.pad(self.words, (0, 1)).index_select(1, quads).reshape(WORDS, -1, QUAD)
        self._table = chosen.transpose(0, 1).contiguous().view(torch.complex128).reshape(-1)
        self._long = [sum(part <= start for part in self.parts) for start in range(QUAD, self.parts[-1], QUAD)]
        basis = tensors["basis"].to(torch.float32) * tensors["scale"].unsqueeze(-1)
        self.maps = torch.nn.functional.pad(basis, (0, 0, 0, 1)).index_select(1, place)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers of codes (k, bytes): float32 (k, 4 lookups)."""
        chosen = torch.cat([codes, *(codes[:, first:] for first in self._long)], 1) if self._long else codes
        index = (chosen + self._entries).reshape(-1)
        return self._table.index_select(0, index).view(torch.float32).reshape(len(codes), self.maps.shape[1])

    def encode(self, components: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest codewords of components (k, width), errors times `scale` (width,): uint8 (k, bytes)."""
        out = torch.zeros(len(components), len(self.parts), dtype=torch.uint8, device=components.device)
        first = 0
        for byte, count in enumerate(self.parts):
            here = slice(first, first + count)
            book = self.words[:, start_of(count) : start_of(count) + count]
            weight = scale[here] / scale[here].max().clamp_min(torch.finfo(torch.float32).tiny)
            out[:, byte] = assign((components[:, here] * weight).unsqueeze(0), (book * weight).unsqueeze(0))[0]
            first += count
        return out


_BOOKS: dict[int, tuple[tuple[Any, ...], _Book]] = {}  # by id of the words: marks of the tables, what is made of them


def _book(tensors: Tables) -> _Book:
    """Return the book of these tables; made once while they live and are not written to."""
    tables = [tensors[name] for name in ("words", "parts", "basis", "scale", "mean")]
    key = id(tables[0])
    found = _BOOKS.get(key)
    if found is not None and all(ref() is table and version == _version(table)
                                 for (ref, version), table in zip(found[0], tables, strict=True)):
        return found[1]
    book = _Book(tensors)
    marks = tuple((weakref.ref(table), _version(table)) for table in tables)
    weakref.finalize(tables[0], _BOOKS.pop, key, None)
    _BOOKS[key] = marks, book
    return book


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@lru_cache(maxsize=1024)
def _lookups(parts: tuple[int, ...], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plan of a row's lookups: the first quad of every byte, then further quads of those that have them.

    Returns
    -------
    (quads, entries, place)
        Columns of the codebooks that make the table of quads, int64 (4 quads,), one past the last for padding; the
        first entry in that table of every lookup, int32; the component of every number, int64, the width for padding.
    """
    quads: list[int] = []
    first: dict[tuple[int, int], int] = {}
    for count in sorted(set(parts)):
        for start in range(0, count, QUAD):
            first[count, start] = len(quads) // QUAD * WORDS
            quads += [start_of(count) + k if k < count else sum(COMPONENTS) for k in range(start, start + QUAD)]
    entries, place = [], []
    for start in range(0, parts[-1], QUAD):
        for byte, count in enumerate(parts):
            if count > start:
                entries.append(first[count, start])
                served = sum(parts[:byte])
                place += [served + k if k < count else width for k in range(start, start + QUAD)]
    return (torch.tensor(quads, device="cpu"), torch.tensor(entries, dtype=torch.int32, device="cpu"),
            torch.tensor(place, device="cpu"))
