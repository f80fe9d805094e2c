"""The best rows of many, or all good ones, each a line of codes: a search among codes that are never decoded.

Row r scores `factors[r] * Σ_l tables[l, code[r, l]] + offsets[r] * weight + base` for a query's tables, a weight and a
base for the piece that the row lies in. So scores are inner products, cosines, or, with half of each row's squared
norm as its offset, an order by distance. Signs are codes, too: four of them are one, and the table has signed sums.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from tersor.ops.code_scan import reference, tiles
from tersor.ops.code_scan.shapes import LEAST_WORK, NIBBLE, SIGNS, TILE, columns_of
from tersor.ops.dispatch import compiled_allowed


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a set, as a scan reads them.

    Attributes
    ----------
    codes : Tensor
        uint8 or, of more than 256 words, int16 (tiles, columns, TILE); see `laid_out`.
    factors, offsets : Tensor
        float32 (count,), finite; factors not negative.
    ids : Tensor
        int64 (count,), each a row's own.
    """

    codes: Tensor
    factors: Tensor
    offsets: Tensor
    ids: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """All rows of a set, in pieces, on the processor."""

    pieces: tuple[Rows, ...]

    def __reduce__(self) -> tuple[type[Lines], tuple[tuple[Rows, ...]]]:
        """Copy without the addresses: those of a copy are others."""
        return Lines, (self.pieces,)

    @cached_property
    def peaks(self) -> tuple[float, float]:
        """The largest factor, and the largest magnitude of an offset."""
        held = [one for one in self.pieces if len(one.factors)]
        return (max(float(one.factors.max()) for one in held), max(float(one.offsets.abs().max()) for one in held))

    @cached_property
    def count(self) -> int:
        """Rows of all pieces."""
        return sum(len(one.factors) for one in self.pieces)

    @cached_property
    def edges(self) -> tuple[Tensor, ...]:
        """Of every tile the inverse of its largest and of its least factor, its least and its largest offset.

        float64 (tiles, 4) a piece.
        """
        return tuple(_edges(one) for one in self.pieces)

    @cached_property
    def places(self) -> np.ndarray:
        """Addresses of codes, factors, offsets and ids, counts, 0: no mask, and those of edges, int64 (pieces, 7)."""
        return np.array([(one.codes.data_ptr(), one.factors.data_ptr(), one.offsets.data_ptr(), one.ids.data_ptr(),
                          len(one.factors), 0, edges.data_ptr())
                         for one, edges in zip(self.pieces, self.edges, strict=True)], np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """All rows of a set in tiles, one piece's after the other's, on any device.

    Attributes
    ----------
    codes : Tensor
        As of `Rows`, (tiles, columns, TILE).
    factors, offsets : Tensor
        float32 (tiles, TILE), 0 beyond a piece's rows; finite, factors not negative.
    ids : Tensor
        int64 (tiles, TILE).
    there : Tensor
        uint8 (tiles, TILE): 0 beyond a piece's rows.
    pieces : Tensor
        int32 (tiles,): the piece that a tile is of.
    peaks : (float, float)
        The largest factor, and the largest magnitude of an offset.
    words : Words or None
        What codes are decoded to, where many queries may multiply it; None for signs, too.
    """

    codes: Tensor
    factors: Tensor
    offsets: Tensor
    ids: Tensor
    there: Tensor
    pieces: Tensor
    peaks: tuple[float, float]
    words: Words | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """Codewords as float16: row and part, a sum over stages.

    Attributes
    ----------
    books : Tensor
        float16 (parts * stages, words, numbers of a part), divided by the unit.
    stages : int
    unit : float
        A power of two.
    reach, lost : Tensor
        What no number of a row exceeds, and what it differs at most from that of float16: float64 (dim,).
    """

    books: Tensor
    stages: int
    unit: float
    reach: Tensor
    lost: Tensor

    @classmethod
    def of(cls, books: Tensor, stages: int, device: torch.device) -> Words:
        """Return codewords (parts * stages, words, numbers of a part), of any float dtype, on a device."""
        wide = books.to(device, torch.float64)
        unit = 2.0 ** max(-100, math.frexp(float(wide.abs().max()))[1])
        near = (wide / unit).to(torch.float16)
        reach, lost = (one.abs().amax(1).unflatten(0, (-1, stages)).sum(1).flatten()
                       for one in (wide, wide - near.to(torch.float64) * unit))
        if stages > 1:  # sums are rounded, too
            lost = lost + 2.0**-10 * reach + 2.0**-24 * unit
        return cls(near.contiguous(), stages, unit, reach, lost)


def _edges(rows: Rows) -> Tensor:
    """Return between what the factors and offsets of each tile lie; see `Lines`."""
    pad, edges = -len(rows.factors) % TILE, []
    for values in (rows.factors.to(torch.float64).reciprocal(), rows.offsets.to(torch.float64)):
        tiles = torch.cat([values, values[-1:].expand(pad)]).unflatten(0, (-1, TILE))
        edges += [tiles.amin(1), tiles.amax(1)]
    return torch.stack(edges, 1).contiguous()


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of some lines.

    Attributes
    ----------
    tables : Tensor
        What codes are looked up in, float64 (queries, lookups, size), finite. A size of 16: each byte of a row is two
        codes, the lower bits first.
    weights : Tensor
        Of offsets, float64 (queries, pieces), or (queries, 1) for all pieces.
    visits : Tensor or None
        bool (queries, pieces): the pieces that are looked at; None: all.
    bases : Tensor or None
        float64 (queries, pieces), finite; None: 0.
    masks : tuple of Tensor or None
        uint8 (count,) a piece: 0 for rows that are left out. Of a stack one, (tiles, TILE), 0 beyond rows, too.
    products : Tensor or None
        What signs or words are multiplied by, whose sums the tables hold; float64 (queries, signs) or (queries, dim).
    """

    tables: Tensor
    weights: Tensor
    visits: Tensor | None = None
    bases: Tensor | None = None
    masks: tuple[Tensor, ...] | None = None
    products: Tensor | None = None

    def based(self) -> Tensor | None:
        """Return the bases, minus infinity for pieces that are not looked at; None: 0 everywhere."""
        if self.visits is None:
            return self.bases
        bases = torch.zeros(self.visits.shape, dtype=torch.float64, device=self.visits.device)
        return (bases if self.bases is None else self.bases).masked_fill(~self.visits, -math.inf)

    def of(self, queries: slice | Tensor) -> Asked:
        """Return what some of the queries ask."""
        some = {name: None if one is None else one[queries] for name, one in
                (("visits", self.visits), ("bases", self.bases), ("products", self.products))}
        return Asked(self.tables[queries], self.weights[queries], masks=self.masks, **some)


@dataclasses.dataclass(frozen=True, eq=False)
class Alone:
    """How queries meet rows of signs one at a time.

    Attributes
    ----------
    mean : ndarray
        What all vectors have in common, float32 (dim,): taken off the query by L2, and met by it else.
    matrix : ndarray
        What takes a query to what signs are multiplied by, float32 (dim, bits).
    size : int
        Rows are divided by `2**size`.
    metric : str
    """

    mean: np.ndarray
    matrix: np.ndarray
    size: int
    metric: str


def laid_out(codes: Tensor) -> Tensor:
    """Return rows of codes (n, columns), uint8 or int16, in tiles: (tiles, columns, TILE), padded with 0."""
    count, columns = codes.shape
    wide = torch.zeros(-(-count // TILE) * TILE, columns, dtype=codes.dtype)
    wide[:count] = codes
    return wide.reshape(-1, TILE, columns).transpose(1, 2).contiguous()


def packed(bits: Tensor) -> Tensor:
    """Return rows of bits, uint8 (n, bits) of 0 and 1, as bytes, uint8 (n, columns): the first is the lowest."""
    return torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))


def sums_of(products: Tensor) -> Tensor:
    """Return tables of four signs' sums, float64 (queries, lookups, 16), for what signs are multiplied by.

    A set bit stands for +1, and others for -1.
    """
    if products.device.type == "cpu" and compiled_allowed("code_scan"):
        from tersor.ops.code_scan import compiled

        return compiled.signed_sums(products)
    pad = 8 * columns_of(products.shape[1]) - products.shape[1]
    wide = torch.nn.functional.pad(products.to(torch.float64), (0, pad)) if pad else products.to(torch.float64)
    return wide.unflatten(1, (-1, SIGNS)) @ _four_signs(products.device)


@cache
def _four_signs(device: torch.device) -> Tensor:
    """Return all of four signs, float64 (SIGNS, NIBBLE)."""
    bits = torch.arange(NIBBLE) >> torch.arange(SIGNS)[:, None]
    return ((bits & 1).to(torch.float64) * 2 - 1).to(device)


def best(lines: Lines | Stack, asked: Asked, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores, float64, and ids, int64, of the best rows of each query, (queries, k).

    Best first; of equal scores the least id first. Where there are fewer rows, minus infinity and -1.

    Notes
    -----
    The kernel rounds every table to bytes and sums those in vectors, as FAISS' fast scans do (André, Kermarrec and Le
    Scouarnec, VLDB 2015; arXiv 1812.09162). That bounds every score, and those whose bound reaches the k-th best so far
    are computed in float64. The bound is certain, so results are those of float64, on any number of threads, and of a
    stack on any device: there a bound is one of a tile, from sums of float32, or of signs times float16.
    """
    if isinstance(lines, Stack):
        return tiles.best(lines, asked, k)
    if compiled_allowed("code_scan"):
        from tersor.ops.code_scan import compiled

        return compiled.best(lines, asked, k)
    return reference.best(lines, asked, k)


def is_little(lines: Lines, queries: int) -> bool:
    """Tell whether one thread does all the work for so many queries that look at all rows."""
    if torch.get_num_threads() == 1:
        return True
    return lines.count * queries * lines.pieces[0].codes.shape[1] < 2 * LEAST_WORK


def one_nearest(lines: Lines, query: Tensor, how: Alone, k: int) -> tuple[Tensor, Tensor] | None:
    """Return distances or scores, float32, and ids, (1, k), of the best rows of signs for a query, on this thread.

    Parameters
    ----------
    lines : Lines
        At least k rows. By `"l2"` offsets are minus half of squared norms, by `"cosine"` the inverse of norms, by which
        factors are divided, too, and by `"ip"` nothing.
    query : Tensor
        float32 (1, dim).
    how : Alone
    k : int

    Returns
    -------
    distances, ids : Tensor, or None
        What `best` finds, by the same bounds, without calls in between; None for a query of numbers beyond `2**size`.
    """
    from tersor.ops.code_scan import compiled

    return compiled.one_nearest(lines, query, how, k)


def within(lines: Lines | Stack, asked: Asked, floors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the scores and ids of all rows that score at least so much, float64 (queries,): those of each query.

    Best first, as `best` orders them.
    """
    if isinstance(lines, Stack):
        return tiles.within(lines, asked, floors)
    if compiled_allowed("code_scan"):
        from tersor.ops.code_scan import compiled

        return compiled.within(lines, asked, floors)
    return reference.within(lines, asked, floors)


__all__ = ["Alone", "Asked", "Lines", "Rows", "Stack", "Words", "best", "is_little", "laid_out", "one_nearest",
           "packed", "sums_of", "within"]
