"""Few queries over closed tokens on the processor, as bytes that name words: a table a byte, and no token decoded."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.near import Blocks, Span, centred, shifted, turned
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
        """See `Met`: (tasks, numbers of words, q)."""
        near = turned(rows, self.words.maps, back=True)
        return near.mT.contiguous().numpy(), shifted(rows, self.words.offset)

    def score(self, asked: np.ndarray, out: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import words

        walk, across = words.walk("scores", out.shape[1]), words.across(out.shape[1], back=True)
        sums = np.empty((self.tokens, out.shape[1]), np.float32)
        for task, rows in zip(range(*span), out, strict=True):
            sums.fill(0.0)
            walk(self.addresses, self._form, self._book, asked[task], sums, task)
            self._resize(sums, task)
            across(rows, at, sums)

    def sums(self, tasks: int, queries: int) -> Tensor:
        """See `Met`: (tasks, numbers of words, q)."""
        return torch.zeros(tasks, self.words.words.shape[1], queries, device="cpu")

    def add(self, weights: np.ndarray, sums: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import words

        walk, across = words.walk("mixture", weights.shape[1]), words.across(weights.shape[1], back=False)
        sized = np.empty((self.tokens, weights.shape[1]), np.float32)
        for task, rows in zip(range(*span), weights, strict=True):
            across(rows, at, sized)
            self._resize(sized, task)
            walk(self.addresses, self._form, self._book, sums[task], sized, task)

    def mixed(self, sums: Tensor, totals: Tensor) -> Tensor:
        """See `Met`."""
        return centred(turned(sums.mT, self.words.maps), totals, self.words.offset)

    def _resize(self, sums: np.ndarray, task: int) -> None:
        """Multiply sums of tokens by their sizes, where they have such."""
        from tersor.ops.kv_attention.kernels import words

        if self.words.sizes is not None:
            words.resize(self.addresses, self._form, self.words.sizes.numpy(), sums, task)

    @cached_property
    def _book(self) -> tuple[np.ndarray, np.ndarray]:
        """Words, float32 (256, numbers); of each byte the first of its numbers, and how many: int64 (bytes, 2)."""
        counts = np.array(self.words.counts, np.int64)
        return self.words.words.contiguous().numpy(), np.stack([counts.cumsum() - counts, counts], 1)

    @property
    def _form(self) -> tuple[int, ...]:
        return self.codes_at, self.words.row_bytes, self.heads, self.block, self.room, self.low, self.high


__all__ = ["Worded"]
