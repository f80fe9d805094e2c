"""Few queries over closed tokens on the processor, as bytes that name words: a table a byte, and no token decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.near import Blocks, Span, centred, shifted, turned
from tersor.ops.kv_attention.shapes import WORDS
from tersor.ops.workers import passes
from tersor.payload.words import Words


@dataclasses.dataclass(frozen=True, eq=False)
class Worded(Blocks):
    """Whole blocks of a side; methods are those of `Met`.

    Attributes
    ----------
    addresses : ndarray
        int64 (pages, batch): of each sequence's slot.
    codes_at : int
        Where codes begin in a slot, bytes.
    """

    words: Words
    addresses: np.ndarray
    codes_at: int

    @property
    def queries(self) -> tuple[int, ...]:
        """How many queries may meet a byte at a time."""
        return 4, 2, 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.words.row_bytes

    def asked(self, rows: Tensor) -> tuple[np.ndarray, Tensor]:
        """See `Met`: what each word of each byte makes with queries, (tasks, bytes, 256, q)."""
        near, count = turned(rows, self.words.maps, back=True), rows.shape[1]
        tables = torch.empty(len(rows), len(self.words.counts), WORDS, count, device="cpu")
        for some, columns, book in self._alike():
            split = near[:, :, columns].unflatten(2, (len(book), -1))
            tables[:, some] = book @ split.permute(0, 2, 3, 1)
        return tables.numpy(), shifted(rows, self.words.offset)

    def score(self, asked: np.ndarray, out: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import words

        sums = np.zeros((span[1] - span[0], self.tokens, out.shape[1]), np.float32)
        self._go("scores", asked, sums, span)
        words.part(self.addresses, self._form(len(self.words.counts)), self._sizes, sums, out, (at, *span))

    def sums(self, tasks: int, queries: int) -> Tensor:
        """See `Met`: of each word of each byte, (tasks, bytes, 256, q)."""
        return torch.zeros(tasks, len(self.words.counts), WORDS, queries, device="cpu")

    def add(self, weights: np.ndarray, sums: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import words

        sized = np.empty((span[1] - span[0], self.tokens, weights.shape[1]), np.float32)
        words.join(self.addresses, self._form(len(self.words.counts)), self._sizes, weights, sized, (at, *span))
        self._go("mixture", sums, sized, span)

    def mixed(self, sums: Tensor, totals: Tensor) -> Tensor:
        """See `Met`."""
        near = torch.empty(len(sums), sums.shape[3], self.words.words.shape[1], device="cpu")
        for some, columns, book in self._alike():
            near[:, :, columns] = (sums[:, some].mT @ book).permute(0, 2, 1, 3).flatten(2)
        return centred(turned(near, self.words.maps), totals, self.words.offset)

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

    def _go(self, verb: str, tables: np.ndarray, sums: np.ndarray, span: Span) -> None:
        """Run a kernel over the tokens of some tasks, some bytes of the rows at a time."""
        from tersor.ops.kv_attention.kernels import words

        for first, count in passes(len(self.words.counts), (words.CHUNK, 4, 2, 1)):
            kernel = words.passes(verb, count, sums.shape[2])
            kernel(self.addresses, self._form(first), tables, sums, span)

    @property
    def _sizes(self) -> np.ndarray:
        """What a byte more of a row stands for; of none: rows have no such."""
        return np.empty(0, np.float32) if self.words.sizes is None else self.words.sizes.numpy()

    def _form(self, first: int) -> tuple[int, ...]:
        return (self.codes_at, self.words.row_bytes, self.heads, self.block, self.room, self.low, self.high, first)


__all__ = ["Worded"]
