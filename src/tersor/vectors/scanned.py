"""Codes that a scan reads as they are: signs of trellis codes, and the words of product codes.

Queries are taken to tables, in which codes are looked up; nothing is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tersor.codecs import LearnedRotation, Product, Residual, Rotated, SpectralTrellis, Sum, Trellis
from tersor.contract.codec import Codec, Encoded
from tersor.ops.code_scan import Words, packed, sums_of
from tersor.ops.code_scan.shapes import BYTE, NIBBLE
from tersor.payload import codes
from tersor.payload.blocks import row_blocks

FEW = 16  # queries that are multiplied by a matrix, which costs less than to call what it stands for
MOST_MATRIX = 1 << 22  # numbers of it
MOST_MOVED = 1 << 25  # of a matrix on a device


def is_scanned(codec: Codec) -> bool:
    """Tell whether a codec, the mean around it left out, has codes that are scanned."""
    inner = _inside(codec)
    return _signed(inner) or bool(_books(inner))


def codes_of(encoded: Encoded) -> Tensor:
    """Return every row's codes as a scan looks them up, uint8 or int16 (n, columns)."""
    stream = _stream(encoded)
    count, width = stream.shape
    if _signed(stream.codec):
        shape = stream.codec.stream_shape(stream.shape)
        held = stream.tensors["codes"]
        return torch.cat([packed(codes.read(held, shape, 2, rows)) for rows in row_blocks(shape, 8)])
    books, size = _books(stream.codec), _size(_books(stream.codec))
    parts = []
    for name, book in books:
        held, stages = stream.tensors[f"{name}codes"], book.stages if isinstance(book, Residual) else 1
        parts.append(codes.read(held, (count, width // book.dim * stages), book.words, slice(0, count)))
    found = torch.cat([part.to(torch.int32) for part in parts], 1)
    if size > BYTE:
        return found.to(torch.int16)  # its bits are those of uint16
    found = found.to(torch.uint8)
    if size == NIBBLE:
        found = torch.nn.functional.pad(found, (0, found.shape[1] % 2))
        found = found[:, ::2] | found[:, 1::2] << 4
    return found.contiguous()


def scales_of(encoded: Encoded) -> Tensor:
    """Return every row's scale, float32 (n,): 1 for words."""
    stream = _stream(encoded)
    if _signed(stream.codec):
        return stream.tensors["scales"].to(torch.float32).reshape(-1)
    return torch.ones(stream.shape[0])


class Meeting:
    """How queries meet codes: what follows from the tables of an index alone.

    Parameters
    ----------
    encoded : Encoded
        Any vectors of it, the mean taken away.
    """

    def __init__(self, encoded: Encoded) -> None:
        stream = _stream(encoded)
        self._encoded, self._signs = encoded, _signed(stream.codec)
        width = encoded.shape[1]
        self._books: list[tuple[Tensor, int]] = []
        self._matrix: Tensor | None = None
        self._moved: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}
        if not self._signs:
            found = _books(stream.codec)
            self._size = _size(found)
            for name, book in found:
                own = {key.removeprefix(name): held for key, held in stream.tensors.items() if key.startswith(name)}
                whole = book.codewords(own) if isinstance(book, Residual) else book.codewords(own, width).unsqueeze(1)
                self._books.append((whole.flatten(1, 2).contiguous(), book.words))
        elif width * stream.codec.stream_shape((1, width))[1] <= MOST_MATRIX:  # type: ignore[attr-defined]
            self._matrix = _met(encoded, torch.eye(width)).contiguous()

    @property
    def matrix(self) -> Tensor | None:
        """What takes queries to what signs are multiplied by, float32 (dim, signs); None for words, or where large."""
        return self._matrix

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what lies on devices."""
        return {**vars(self), "_moved": {}}

    def tables(self, queries: Tensor) -> Tensor:
        """Return tables, float64 (n, lookups, size), for float32 queries (n, dim)."""
        if not self._signs:
            return self._looked_up(_met(self._encoded, queries))
        few = self._matrix is not None and len(queries) <= FEW
        return sums_of(queries @ self._matrix if few else _met(self._encoded, queries))  # type: ignore[operator]

    def tables_on(self, queries: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return tables on a device, and what signs or words are multiplied by, float64 (n, numbers), or None.

        Both are linear in queries, so there they are products with matrices, which are kept. Where those are large,
        tables are made on the processor.
        """
        met, tabled = self._on(device)
        wide = queries.to(device, torch.float64)
        products = None if met is None else wide @ met
        if self._signs:
            return (self.tables(queries).to(device), None) if products is None else (sums_of(products), products)
        if tabled is None:
            return self.tables(queries).to(device), products
        return (wide @ tabled.flatten(1)).unflatten(1, tabled.shape[1:]), products

    @cached_property
    def numbers(self) -> int:
        """Numbers of one query's tables."""
        return self.tables(torch.zeros(1, self._encoded.shape[1])).numel()

    def words_on(self, device: torch.device) -> Words | None:
        """Return codewords as many queries are multiplied with them; None for signs, and for sums of products."""
        if self._signs or len(self._books) > 1:
            return None
        (books, words), = self._books
        stages = books.shape[1] // words
        return Words.of(books.unflatten(1, (stages, words)).flatten(0, 1), stages, device)

    def _on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return matrices that take queries to what is multiplied, and to tables, float64, where they are not large."""
        if device not in self._moved:
            width, stream, met, tabled = self._encoded.shape[1], _stream(self._encoded), self._matrix, None
            numbers = stream.codec.stream_shape((1, width))[1] if self._signs else width  # type: ignore[attr-defined]
            if met is None and len(self._books) < 2 and width * numbers <= MOST_MOVED:
                met = _met(self._encoded, torch.eye(width))
            lookups = sum(books.shape[0] * (books.shape[1] // words) for books, words in self._books)
            if not self._signs and width * lookups * self._size <= MOST_MOVED:
                tabled = self.tables(torch.eye(width)).to(device)
            self._moved[device] = None if met is None else met.to(device, torch.float64), tabled
        return self._moved[device]

    def _looked_up(self, met: Tensor) -> Tensor:
        """Return the products of all words, float64 (n, lookups, size)."""
        parts = []
        for books, words in self._books:
            split = met.unflatten(1, (books.shape[0], -1)).transpose(0, 1)
            found = (split @ books.transpose(1, 2)).transpose(0, 1).unflatten(2, (-1, words))
            found = found.flatten(1, 2)
            pad = found[..., :1].expand(-1, -1, self._size - found.shape[2])
            parts.append(torch.cat([found, pad], 2))
        whole = torch.cat(parts, 1)
        if self._size == NIBBLE and whole.shape[1] % 2:
            whole = torch.nn.functional.pad(whole, (0, 0, 0, 1))
        return whole.to(torch.float64)


def _met(encoded: Encoded, x: Tensor) -> Tensor:
    """Return what codes meet instead of vectors."""
    codec = encoded.codec
    if isinstance(codec, LearnedRotation):
        return _met(codec.child(encoded), x @ encoded.tensors["rotation"].to(torch.float32).T)
    return codec.coordinates(encoded).into(x)


def _stream(encoded: Encoded) -> Encoded:
    """Return what lies inside the transforms that queries are taken through."""
    while _is_passed(encoded.codec):
        encoded = encoded.codec.child(encoded)  # type: ignore[attr-defined]
    return encoded


def _inside(codec: Codec) -> Codec:
    while _is_passed(codec):
        codec = codec.inner  # type: ignore[attr-defined]
    return codec


def _is_passed(codec: Codec) -> bool:
    return isinstance(codec, LearnedRotation) or (isinstance(codec, Rotated) and codec.side == "in")


def _signed(codec: Codec) -> TypeGuard[Trellis | SpectralTrellis]:
    """Tell whether codes are signs, times a scale a row."""
    return isinstance(codec, SpectralTrellis) or (isinstance(codec, Trellis) and codec.axis == "in")


def _books(codec: Codec) -> list[tuple[str, Product | Residual]]:
    """Return product codecs that are summed, with the prefix of their tensors; none where others are."""
    if isinstance(codec, (Product, Residual)):
        return [("", codec)]
    if isinstance(codec, Sum) and all(isinstance(stage, Product) for stage in codec.stages):
        return [(f"{name}/", stage) for name, stage in codec.children().items() if isinstance(stage, Product)]
    return []


def _size(books: Sequence[tuple[str, Product | Residual]]) -> int:
    """Return the size of tables: of half bytes, of bytes, or of the largest codebook."""
    most = max(book.words for _, book in books)
    return NIBBLE if most <= NIBBLE else BYTE if most <= BYTE else 1 << math.ceil(math.log2(most))
