"""Pages: where a stream's payload lies, so that it grows without being moved, and copies share what is full.

A page is one buffer of bytes with room for some blocks: for each tensor of the payload the parts of all its blocks, one
behind the other. Pages are shared by copies of a stream; one that is shared is copied before it is written to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.payload.layout import TensorSpec

ALIGNED = 16  # bytes: what kernels read at once


class Pages:
    """The payload of blocks that lie side by side.

    Parameters
    ----------
    specs : mapping
        Of one block of one sequence, by name.
    batch : int
    blocks : int
        Of a page; a power of two.
    device : torch.device

    Attributes
    ----------
    starts : mapping of str to int
        Where each tensor begins in a page, bytes.
    count : int
        Blocks held.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], batch: int, blocks: int, device: torch.device) -> None:
        self.specs, self.batch, self.blocks, self.device = dict(specs), batch, blocks, device
        self.starts: dict[str, int] = {}
        self.count = self._size = 0
        for name, spec in self.specs.items():
            self.starts[name] = self._size
            self._size += -(-blocks * batch * spec.nbytes // ALIGNED) * ALIGNED
        self._size += ALIGNED  # kernels may read a word past the last code
        self._buffers: list[Tensor] = []
        self._shared: list[bool] = []
        self._addresses: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks held, room apart."""
        return self.count * self.batch * sum(spec.nbytes for spec in self.specs.values())

    def part(self, name: str, low: int, high: int) -> Tensor:
        """Return a tensor's blocks `low` to `high`, all of one page: a view (blocks, batch, *stored shape)."""
        page, first = divmod(low, self.blocks)
        return self._whole(name, page)[first : first + high - low]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor's blocks, one behind the other: (blocks, batch, *stored shape)."""
        parts = [self._whole(name, page)[: self.count - page * self.blocks] for page in range(len(self._buffers))]
        shape = self.specs[name].stored_shape
        return torch.cat(parts) if parts else torch.empty(0, self.batch, *shape, dtype=self.specs[name].dtype,
                                                          device=self.device)

    def append(self, tensors: Mapping[str, Tensor], blocks: int) -> None:
        """Write blocks behind those held: each tensor (blocks, batch, *stored shape).

        Raises
        ------
        torch.OutOfMemoryError
            If there is no room for a page; says how many bytes were asked, and leaves what is held as it was.
        """
        self._reserve(self.count + blocks)
        done = 0
        while done < blocks:
            page, first = divmod(self.count + done, self.blocks)
            many = min(blocks - done, self.blocks - first)
            for name, tensor in tensors.items():
                self._whole(name, page)[first : first + many] = tensor[done : done + many]
            done += many
        self.count += blocks

    def cut(self, blocks: int) -> None:
        """Keep the first blocks."""
        kept = -(-blocks // self.blocks)
        self.count, self._addresses = blocks, None
        del self._buffers[kept:], self._shared[kept:]

    def select(self, index: Tensor) -> Pages:
        """Return pages of their own with some of the sequences."""
        chosen = Pages(self.specs, index.numel(), self.blocks, self.device)
        chosen._reserve(self.count)
        near = index.to(self.device)
        for page in range(len(self._buffers)):
            for name in self.specs:
                torch.index_select(self._whole(name, page), 1, near, out=chosen._whole(name, page))
        chosen.count = self.count
        return chosen

    def copy(self) -> Pages:
        """Return pages that share these until one of the two is written to."""
        twin = Pages(self.specs, self.batch, self.blocks, self.device)
        twin.count, twin._buffers = self.count, list(self._buffers)
        self._shared = [True] * len(self._buffers)
        twin._shared = list(self._shared)
        return twin

    def buffers(self) -> tuple[Tensor, ...]:
        """Return the pages, uint8."""
        return tuple(self._buffers)

    def addresses(self) -> Tensor:
        """Return how far each page is from the first, in units of 16 bytes: int64 (room,), on the device.

        It is a tensor of its own for as long as no page is added.
        """
        if self._addresses is None:
            first = self._buffers[0].data_ptr()
            far = [(buffer.data_ptr() - first) // ALIGNED for buffer in self._buffers]
            self._addresses = torch.tensor(far, dtype=torch.int64).to(self.device, non_blocking=True)
        return self._addresses

    def _whole(self, name: str, page: int) -> Tensor:
        """Return all that a page has of a tensor."""
        spec, start = self.specs[name], self.starts[name]
        shape = (self.blocks, self.batch, *spec.stored_shape)
        raw = self._buffers[page][start : start + math.prod(shape) * spec.dtype.itemsize]
        return raw.view(spec.dtype).view(shape)

    def _reserve(self, blocks: int) -> None:
        """Make room for so many blocks, and let the pages to be written to be the stream's own."""
        needed, first = -(-blocks // self.blocks), self.count // self.blocks
        fresh = [self._new() for _ in range(needed - len(self._buffers))]
        if first < len(self._buffers) and self._shared[first]:
            self._buffers[first] = self._buffers[first].clone()
            self._shared[first] = False
            self._addresses = None
        if fresh:
            self._buffers += fresh
            self._shared += [False] * len(fresh)
            self._addresses = None

    def _new(self) -> Tensor:
        try:
            return torch.zeros(self._size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{self.device} has no room for a page of {self._size:,} bytes: {self.blocks} "
                                         f"blocks of {self.batch} sequences; the {self.count} blocks held are as they "
                                         "were") from error


__all__ = ["Pages"]
