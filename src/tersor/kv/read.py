"""A stream's blocks as attention's kernels on a GPU read them: as codes, as signs, or as bytes that name words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tersor.contract.codec import Encoded
from tersor.kv.coded import Form
from tersor.kv.kept import Kept
from tersor.ops.kv_attention import (
    Book,
    Levels,
    Lying,
    Octets,
    Side,
    Spelled,
    lie_as_octets,
    lie_as_signs,
    look_up,
)
from tersor.payload.blocks import Tables

if TYPE_CHECKING:
    from tersor.payload.words import Words


class Read(Kept):
    """Blocks, and what kernels are to know of their codec."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self._form: tuple[Form | None] | None = None  # made at the first use
        self._words: tuple[Words | None] | None = None  # likewise
        self._book: tuple[Book | None] | None = None  # likewise, of keys or of values

    def side(self) -> Side | None:
        """Return the tokens as attention's kernels read them, or None where they are coded otherwise or there are none.

        It is good until the stream changes.
        """
        if self._pages is None or not self._blocks or (form := self._as_codes(self._pages.device)) is None:
            return None
        starts, codes = self._pages.starts, form.coded.codes
        way = self._pages.lying.get(codes)
        return Side(form.levels, self._pages.buffers(), self._pages.slots(), self._pages.addresses(), starts[codes],
                    starts[form.coded.scales], None if isinstance(way, Book) else way,
                    self._pages.tickets(self.heads) if isinstance(way, Octets | Lying) else None)

    def spelled(self, *, values: bool) -> Spelled | None:
        """Return the tokens as kernels that look words up read them, None where they are no words or there are none.

        It is good until the stream changes.
        """
        if self._pages is None or not self._blocks or (book := self._as_book(values)) is None:
            return None
        name = self._codes
        return Spelled(book, self._pages.buffers(), self._pages.slots(), self._pages.addresses(),
                       self._pages.starts[name], name in self._pages.lying)

    def lie_as_words(self, *, values: bool) -> None:
        """Let bytes of rows lie as kernels look words up, of keys or of values; see `lie_for_kernels`."""
        assert self._pages is not None
        book = self._as_book(values)
        assert book is not None
        if self._codes not in self._pages.lying:
            self._pages.lie(self._codes, book)

    @property
    def near(self) -> bool:
        """Whether there are blocks, all on a GPU and token by token."""
        pages = self._pages
        return pages is not None and bool(self._blocks) and pages.device.type == "cuda" and not (
            pages.lying or pages.far_nbytes)

    def levels(self) -> Levels | None:
        """Return what codes stand for to attention's kernels, where blocks on a GPU lie token by token; else None."""
        form = self._as_codes(self._pages.device) if self._pages is not None and self.near else None
        return None if form is None else form.levels

    def lie_as_signs(self, *, across: bool) -> None:
        """Let bits of blocks lie as kernels meet signs with queries, or `across` with weights; see `meet_as_signs`."""
        assert self._pages is not None
        form = self._as_codes(self._pages.device)
        assert form is not None
        assert form.levels.lines is not None
        self._pages.lie(form.coded.codes, Lying(self.heads, self.block, form.levels.lines.shape[1], across))

    def lie_as_octets(self, *, across: bool) -> None:
        """Let codes of blocks lie as kernels multiply them as integers, of keys or `across` of values."""
        assert self._pages is not None
        form = self._as_codes(self._pages.device)
        assert form is not None
        assert form.levels.octets is not None  # made now: a captured step could not copy them to the device
        self._pages.lie(form.coded.codes, Octets(self.heads, self.block, self.dim, form.levels.bits, across))

    def _as_codes(self, device: torch.device) -> Form | None:
        """Return how blocks that lie side by side are coded, where attention's kernels know such."""
        if self._form is None:
            self._form = (Form.of(self.codec, self._unit, self._tables or self._given, device),)
        return self._form[0]

    def _as_words(self) -> Words | None:
        """Return what bytes of blocks that lie side by side stand for, where they name words."""
        if self._words is None:
            self._words = (self.codec.coordinates(self._view(0, 1)).words(),)
        return self._words[0]

    def _as_book(self, values: bool) -> Book | None:
        """Return words as kernels on a GPU look them up, where they do."""
        if self._book is None:
            words = self._as_words()
            self._book = (None if words is None else Book.of(words, values=values),)
        return self._book[0]

    @property
    def _codes(self) -> str:
        words = self._as_words()
        assert words is not None
        return words.codes

    def _view(self, low: int, high: int) -> Encoded:
        """Return blocks `low` to `high` as one encoded matrix."""
        assert self._pages is not None
        tensors = {name: self._pages.part(name, low, high).flatten(0, 2) for name in self._pages.names}
        return Encoded(self.codec, ((high - low) * self.batch * self.heads * self.block, self.dim),
                       {**tensors, **self._tables})

    def _know(self, other: Read) -> None:
        """Take over what another stream of the codec knows."""
        self._form, self._words, self._book = other._form, other._words, other._book


def lie_for_kernels(keys: Read, values: Read) -> None:
    """Let blocks on a GPU lie as kernels of attention read them, where they lie otherwise when they are written."""
    multiply_as_octets(keys, values)
    meet_as_signs(keys, values)
    sides = keys.near, values.near
    if all(sides) and look_up(keys.spelled(values=False), values.spelled(values=True)):
        keys.lie_as_words(values=False)
        values.lie_as_words(values=True)


def multiply_as_octets(keys: Read, values: Read) -> None:
    """Let codes lie as kernels on a GPU multiply integers of 8 bits, where keys and values have such levels."""
    near, far = keys.levels(), values.levels()
    if near is not None and far is not None and lie_as_octets(near, far, keys.dim, keys.block):
        keys.lie_as_octets(across=False)
        values.lie_as_octets(across=True)


def meet_as_signs(keys: Read, values: Read) -> None:
    """Let bits lie as kernels on a GPU meet signs, where keys and values are such, once it pays."""
    near, far = keys.levels(), values.levels()
    rows = keys.tokens * keys.batch * keys.heads
    if near is not None and far is not None and lie_as_signs(near, far, keys.block, rows):
        keys.lie_as_signs(across=False)
        values.lie_as_signs(across=True)


__all__ = ["Read", "lie_for_kernels", "meet_as_signs"]
