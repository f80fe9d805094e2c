"""Few queries over closed tokens on the processor, as bytes that name words: a table a byte, and no token decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.shapes import WORDS
from tersor.ops.workers import passes, share
from tersor.payload.words import Words

QUERIES = (4, 2, 1)  # that meet a byte at a time


@dataclasses.dataclass(frozen=True)
class Worded:
    """Whole blocks of a side: `low` to `high` of `heads` heads, in blocks of `block` tokens.

    Attributes
    ----------
    addresses : ndarray
        int64 (pages, batch): of each sequence's slot.
    codes_at : int
        Where codes begin in a slot, bytes.
    room : int
        Blocks of a page.
    """

    words: Words
    addresses: np.ndarray
    codes_at: int
    heads: int
    block: int
    room: int
    low: int
    high: int

    @property
    def tokens(self) -> int:
        """Tokens of the blocks."""
        return (self.high - self.low) * self.block

    def scores(self, asked: Tensor) -> Tensor:
        """Return products of queries, float32 (batch, heads, q, dim), with the tokens: float32 (…, q, tokens)."""
        batch, heads, queries = asked.shape[:3]
        near = (asked @ self.words.maps.mT).reshape(batch * heads, queries, -1)
        found = []
        for first, count in passes(queries, QUERIES):
            tables = torch.empty(len(near), len(self.words.counts), WORDS, count, device="cpu")
            for some, columns, book in self._alike():
                split = near[:, first : first + count, columns].unflatten(2, (len(book), -1))
                tables[:, some] = book @ split.permute(0, 2, 3, 1)
            sums = torch.zeros(len(near), self.tokens, count, device="cpu")
            self._go("scores", tables, sums)
            self._size(sums)
            found.append(sums.transpose(1, 2))
        products = torch.cat(found, 1).reshape(batch, heads, queries, -1)
        return products.add_((asked * self.words.offset[:, None]).sum(-1, keepdim=True))

    def mixture(self, weights: Tensor) -> Tensor:
        """Return sums of the tokens under weights, float32 (batch, heads, q, tokens): float32 (…, q, dim)."""
        batch, heads, queries, tokens = weights.shape
        flat, found = weights.reshape(batch * heads, queries, tokens), []
        for first, count in passes(queries, QUERIES):
            sums = flat[:, first : first + count].transpose(1, 2).contiguous()
            self._size(sums)
            tables = torch.zeros(len(flat), len(self.words.counts), WORDS, count, device="cpu")
            self._go("mixture", tables, sums)
            near = torch.empty(len(flat), count, self.words.words.shape[1], device="cpu")
            for some, columns, book in self._alike():
                near[:, :, columns] = (tables[:, some].mT @ book).permute(0, 2, 1, 3).flatten(2)
            found.append(near)
        total = torch.cat(found, 1).reshape(batch, heads, queries, -1) @ self.words.maps
        return total.add_(weights.sum(-1, keepdim=True) * self.words.offset[:, None])

    def _alike(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield bytes whose words have as many numbers: which they are, their columns, their words (bytes, 256, n)."""
        counts, byte, column = self.words.counts, 0, 0
        while byte < len(counts):
            size = counts[byte]
            many = counts.count(size)
            columns = slice(column, column + many * size)
            book = self.words.words[:, columns].unflatten(1, (many, size)).transpose(0, 1)
            yield slice(byte, byte + many), columns, book
            byte, column = byte + many, columns.stop

    def _go(self, verb: str, tables: Tensor, sums: Tensor) -> None:
        """Run a kernel over all heads of all sequences, in shares, some bytes of the rows at a time."""
        from tersor.ops.kv_attention.kernels import words

        for first, count in passes(len(self.words.counts), (words.CHUNK, 4, 2, 1)):
            kernel, form = words.passes(verb, count, sums.shape[2]), self._form(first)
            given = tables.numpy(), sums.numpy()
            share(len(sums), len(sums) * self.tokens * count,
                  lambda span, k=kernel, f=form, g=given: k(self.addresses, f, *g, span))

    def _size(self, sums: Tensor) -> None:
        """Multiply the sums of tokens by their sizes, where they have such."""
        if self.words.sizes is None:
            return
        from tersor.ops.kv_attention.kernels import words

        form = self._form(len(self.words.counts))
        words.scale(self.addresses, form, self.words.sizes.numpy(), sums.numpy(), (0, len(sums)))

    def _form(self, first: int) -> tuple[int, ...]:
        return (self.codes_at, self.words.row_bytes, self.heads, self.block, self.room, self.low, self.high, first)


__all__ = ["Worded"]
