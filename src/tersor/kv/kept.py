"""Where a stream's blocks lie: in pages, or one by one where payloads do not lie side by side; and what they take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded
from tersor.errors import CodecConfigError
from tersor.kv.beside import lie_side_by_side
from tersor.kv.pages import Pages
from tersor.payload.blocks import Shape, Tables
from tersor.payload.layout import Layout

CHUNK_ELEMENTS = 1 << 18  # dense numbers that are decoded at a time: 1 MiB, which caches hold
PAGE_BLOCKS = 16  # least blocks of a page


class Kept:
    """The blocks of a stream; what is done with them is `TokenStream`'s.

    Attributes
    ----------
    codec : Codec
    block : int
    batch, heads, dim : int
        0 before the first block.
    """

    codec: Codec
    block: int

    def __init__(self, tables: Tables) -> None:
        self.batch = self.heads = self.dim = self._blocks = 0
        self._given, self._tables = dict(tables), dict[str, Tensor]()
        self._pages: Pages | None = None
        self._single: list[list[Encoded]] | None = None  # [block][sequence], where payloads cannot lie side by side

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self._blocks * self.block

    @property
    def nbytes(self) -> int:
        """Bytes of the payload of the tokens held, measured from the tensors; shared tables apart."""
        if self._single is not None:
            held = (t for row in self._single for one in row for name, t in one.tensors.items()
                    if name not in self._tables)
            return sum(t.numel() * t.element_size() for t in held)
        return 0 if self._pages is None else self._pages.nbytes

    @property
    def near_nbytes(self) -> int:
        """Bytes on the device: of pages, room and what is shared included."""
        return self.nbytes if self._pages is None else self._pages.near_nbytes

    @property
    def far_nbytes(self) -> int:
        """Bytes of pages in the processor's memory."""
        return 0 if self._pages is None else self._pages.far_nbytes

    @property
    def table_nbytes(self) -> int:
        """Bytes of the shared tables, counted once."""
        return sum(t.numel() * t.element_size() for t in (self._tables or self._given).values())

    @property
    def page_blocks(self) -> int:
        """Blocks of a page, 0 before there is one."""
        return 0 if self._pages is None else self._pages.blocks

    def select(self, index: Tensor) -> None:
        """Reorder, repeat or choose sequences: int64 (new batch,) of positions along the batch; nothing is encoded."""
        if index.ndim != 1 or not index.numel() or (self._blocks and not index.is_cuda and not (
                0 <= int(index.min()) <= int(index.max()) < self.batch)):
            raise CodecConfigError(f"kv: select needs positions from 0 to {self.batch - 1}, found {index.tolist()}")
        if not self._blocks:
            return
        if self._single is not None:
            self._single = [[row[k] for k in index.tolist()] for row in self._single]
        if self._pages is not None:
            self._pages = self._pages.select(index)
        self.batch = index.numel()

    def drop(self, blocks: int) -> None:
        """Forget the first blocks: the token behind them becomes the first."""
        if not 0 <= blocks <= self._blocks:
            raise CodecConfigError(f"kv: cannot drop {blocks} of {self._blocks} blocks")
        self._blocks -= blocks
        if self._pages is not None:
            self._pages.drop(blocks)
        if self._single is not None:
            del self._single[:blocks]

    def reserve(self, blocks: int) -> None:
        """Make room for so many blocks more, where pages are there already.

        Raises
        ------
        torch.OutOfMemoryError
            If there is none; says how many bytes were asked, and leaves what is held as it was.
        """
        if self._pages is not None:
            self._pages.reserve(blocks)

    def release(self) -> None:
        """Give back pages that hold no block."""
        if self._pages is not None:
            self._pages.cut(self._pages.count)

    def more_nbytes(self, blocks: int, shape: tuple[int, int, int]) -> int:
        """Return the bytes on the device that so many blocks more take; fewer than none are dropped before them.

        Parameters
        ----------
        shape : (int, int, int)
            Batch, heads and dimension, where nothing is held yet.
        """
        if self._pages is not None:
            return self._pages.more_nbytes(blocks)
        batch, heads, dim = (self.batch, self.heads, self.dim) if self._blocks else shape
        specs = _own(self.codec.layout((heads * self.block, dim)))
        if self._single is not None or not lie_side_by_side(self.codec, (heads * self.block, dim), self._given):
            return blocks * batch * sum(spec.nbytes for spec in specs.values())
        return Pages(specs, batch, self._room((batch, heads, dim)), torch.device("cpu")).more_nbytes(blocks)

    def away(self) -> None:
        """Let full pages lie in the processor's memory."""
        if self._pages is not None:
            self._pages.away()

    def bring(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to bring what lies in the processor's memory, by a stream that the device's own then waits for."""
        if self._pages is not None:
            self._pages.bring(stream)

    @property
    def _unit(self) -> Shape:
        """Shape of the matrix of one block of one sequence."""
        return self.heads * self.block, self.dim

    @property
    def _device(self) -> torch.device | None:
        if self._single:
            return next(iter(self._single[0][0].tensors.values())).device
        return None if self._pages is None else self._pages.device

    def _step(self, elements: int | None = None) -> int:
        """Blocks decoded at a time."""
        return step_of((self.batch, self.heads, self.dim), self.block, elements)

    def _room(self, shape: tuple[int, int, int]) -> int:
        """Return the blocks of a page for a batch, heads and a dimension."""
        return 1 << (max(PAGE_BLOCKS, step_of(shape, self.block)) - 1).bit_length()

    def _own(self) -> Layout:
        """Return the layout of one block of one sequence, shared tables apart."""
        return _own(self.codec.layout(self._unit))

    def _append(self, tensors: Mapping[str, Tensor], blocks: int) -> None:
        """Write blocks that lie side by side behind those held."""
        if self._pages is None:
            room = self._room((self.batch, self.heads, self.dim))
            self._pages = Pages(self._own(), self.batch, room, next(iter(tensors.values())).device)
        self._pages.append(tensors, blocks)


def step_of(shape: tuple[int, int, int], block: int, elements: int | None = None) -> int:
    """Return how many blocks of (batch, heads, dimension) are decoded at a time."""
    batch, heads, dim = shape
    return max(1, (CHUNK_ELEMENTS if elements is None else elements) // max(1, batch * heads * block * dim))


def _own(layout: Layout) -> Layout:
    return {name: spec for name, spec in layout.items() if not spec.shared}


__all__ = ["CHUNK_ELEMENTS", "PAGE_BLOCKS", "Kept", "step_of"]
