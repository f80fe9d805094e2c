"""Pages: where a stream's payload lies, so that it grows without being moved, and copies share what is full.

A page is one buffer with a slot for each sequence of a batch; a slot has room for some blocks: for each tensor of the
payload the parts of all its blocks, one behind the other. A table says which slot of which page holds a sequence's
blocks. So copies of a cache, and sequences that began alike, share pages; one that is shared is copied before it is
written to. Full pages may lie in the processor's memory, from where they are brought for a while.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.ops.kv_attention import Book, Lying, Octets, laid
from tersor.payload.layout import TensorSpec

PUT_AT_ONCE = 128  # blocks: their bits take a byte each meanwhile
ALIGNED = 16  # bytes: what kernels on a GPU read at once
BEYOND = 3 * ALIGNED  # that kernels may read behind codes


@dataclasses.dataclass(eq=False)
class Page:
    """A buffer, uint8 (slots, bytes of a slot).

    Attributes
    ----------
    near, far : Tensor or None
        It, on the stream's device or in the processor's memory: one of the two.
    users : WeakSet of Pages
        Who shares it.
    """

    near: Tensor | None
    far: Tensor | None = None
    users: weakref.WeakSet[Pages] = dataclasses.field(default_factory=weakref.WeakSet)

    @property
    def slots(self) -> int:
        """Sequences it has room for."""
        held = self.far if self.near is None else self.near
        assert held is not None
        return held.shape[0]

    def away(self) -> None:
        """Let it lie in the processor's memory."""
        if self.near is not None:
            if self.near.is_cuda:
                self.far = torch.empty(self.near.shape, dtype=torch.uint8, pin_memory=True)
                self.far.copy_(self.near, non_blocking=True)
            else:
                self.far = self.near.cpu()
            self.near = None


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
        Where each tensor begins in a slot, bytes.
    lying : dict of str to Lying, Octets or Book
        How bits of blocks lie, of tensors that lie otherwise than they are given.
    count : int
        Blocks held.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], batch: int, blocks: int, device: torch.device) -> None:
        self.specs, self.batch, self.blocks, self.device = dict(specs), batch, blocks, device
        self.lying: dict[str, Lying | Octets | Book] = {}
        self.starts: dict[str, int] = {}
        self.count = self._size = 0
        for name, spec in self.specs.items():
            self.starts[name] = self._size
            self._size += -(-blocks * spec.nbytes // ALIGNED) * ALIGNED
        self._size += BEYOND  # kernels may read past the last code
        self._pages: list[Page] = []
        self._slots: list[Tensor | None] = []  # of each sequence, int64 (batch,) on the device; None: its own number
        self._brought: dict[int, Tensor] = {}
        self._addresses: Tensor | None = None
        self._tickets: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self.specs)

    def tickets(self, heads: int) -> Tensor:
        """Return zeros for each sequence's `heads`, int32 (batch heads,), by which programs of a kernel are counted."""
        if self._tickets is None:
            self._tickets = torch.zeros(self.batch * heads, dtype=torch.int32, device=self.device)
        return self._tickets

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks held, room apart, as if nothing were shared."""
        return self.count * self.batch * sum(spec.nbytes for spec in self.specs.values())

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page."""
        return self.batch * self._size

    @property
    def near_nbytes(self) -> int:
        """Bytes of the pages on the device, room and shared ones included."""
        return sum(page.near.numel() for page in self._pages if page.near is not None)

    @property
    def far_nbytes(self) -> int:
        """Bytes of the pages in the processor's memory."""
        return sum(page.far.numel() for page in self._pages if page.far is not None)

    def part(self, name: str, low: int, high: int) -> Tensor:
        """Return a tensor's blocks `low` to `high`, all of one page: (blocks, batch, *stored shape)."""
        held, way = self._lying_part(name, low, high), self.lying.get(name)
        return held if way is None else way.get(held)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor's blocks, one behind the other: (blocks, batch, *stored shape)."""
        parts = [self.part(name, low, min(low + self.blocks, self.count)) for low in range(0, self.count, self.blocks)]
        shape = self.specs[name].stored_shape
        return torch.cat(parts) if parts else torch.empty(0, self.batch, *shape, dtype=self.specs[name].dtype,
                                                          device=self.device)

    def append(self, tensors: Mapping[str, Tensor], blocks: int, *, lain: bool = False) -> None:
        """Write blocks behind those held: each tensor (blocks, batch, *stored shape), `lain` or not.

        Raises
        ------
        torch.OutOfMemoryError
            If there is no room for a page; says how many bytes were asked, and leaves what is held as it was.
        """
        self.reserve(blocks)
        lying = tensors if lain else {name: self.lain(name, tensor) for name, tensor in tensors.items()}
        done = 0
        while done < blocks:
            page, first = divmod(self.count + done, self.blocks)
            many = min(blocks - done, self.blocks - first)
            for name, tensor in lying.items():
                whole = self._whole(name, self._buffer(page))
                whole[:, first : first + many] = tensor[done : done + many].transpose(0, 1)
            done += many
        self.count += blocks

    def lain(self, name: str, tensor: Tensor) -> Tensor:
        """Return blocks of a tensor as they lie in pages."""
        way = self.lying.get(name)
        return tensor if way is None else torch.cat([laid(way, some) for some in tensor.split(PUT_AT_ONCE)])

    def lie(self, name: str, way: Lying | Octets | Book) -> None:
        """Let the bits of a tensor, bytes of a block in a row, lie so from now on; before anything shares the pages."""
        assert name not in self.lying
        for number in range(len(self._pages)):
            self._own(number)
            whole = self._whole(name, self._buffer(number))
            whole.copy_(laid(way, whole))
        self.lying[name] = way

    def reserve(self, blocks: int) -> None:
        """Make room for so many blocks more, and let the pages to be written to be the stream's own; as `append`."""
        if not blocks:
            return
        needed, first = -(-(self.count + blocks) // self.blocks), self.count // self.blocks
        fresh = [self._new() for _ in range(needed - len(self._pages))]
        for number in range(first, min(needed, len(self._pages))):
            self._own(number)
        for buffer in fresh:
            self._add(buffer)

    def more_nbytes(self, blocks: int) -> int:
        """Return what so many blocks more would take, bytes; a negative number counts those dropped before them."""
        return (-(-max(0, self.count + blocks) // self.blocks) - len(self._pages)) * self.page_nbytes

    def cut(self, blocks: int) -> None:
        """Keep the first blocks."""
        kept = -(-blocks // self.blocks)
        self.count = blocks
        self._forget(kept, len(self._pages))

    def drop(self, blocks: int) -> None:
        """Forget the first blocks; those behind them move up, if a page goes on being used."""
        whole, rest = divmod(blocks, self.blocks)
        self._forget(0, whole)
        self.count -= blocks
        if rest:
            for page in range(-(-self.count // self.blocks)):
                self._own(page)
                behind = page + 1 < len(self._pages)
                for name in self.specs:
                    here = self._whole(name, self._buffer(page))
                    here[:, : self.blocks - rest] = here[:, rest:].clone()
                    if behind:
                        low = (page + 1) * self.blocks
                        here[:, self.blocks - rest :] = self._lying_part(name, low, low + rest).transpose(0, 1)
            self._forget(-(-self.count // self.blocks), len(self._pages))

    def select(self, index: Tensor) -> Pages:
        """Return pages of some of the sequences: these, shared, unless less than half of their slots stay in use."""
        chosen, near = Pages(self.specs, index.numel(), self.blocks, self.device), index.to(self.device)
        chosen.count, chosen.lying = self.count, dict(self.lying)
        for number, page in enumerate(self._pages):
            slots = self._slots[number]
            taken = near if slots is None else slots.index_select(0, near)
            if 2 * chosen.batch <= page.slots:
                chosen._add(self._buffer(number).index_select(0, taken))
            else:
                chosen._share(page, taken)
        return chosen

    def copy(self) -> Pages:
        """Return pages that share these until one of the two is written to."""
        twin = Pages(self.specs, self.batch, self.blocks, self.device)
        twin.count, twin._brought, twin.lying = self.count, dict(self._brought), dict(self.lying)
        for page, slots in zip(self._pages, self._slots, strict=True):
            twin._share(page, slots)
        return twin

    def away(self) -> None:
        """Let full pages lie in the processor's memory, and drop those that were brought."""
        for page in self._pages[: self.count // self.blocks]:
            page.away()
        self._brought, self._addresses = {}, None

    def bring(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to bring what lies in the processor's memory, by a stream that the device's own then waits for."""
        for number, page in enumerate(self._pages):
            if page.far is not None and number not in self._brought:
                if stream is None:
                    self._brought[number] = page.far.to(self.device, non_blocking=True)
                    continue
                near = torch.empty(page.far.shape, dtype=torch.uint8, device=self.device)
                stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):
                    near.copy_(page.far, non_blocking=True)
                near.record_stream(stream)
                self._brought[number] = near
        self._addresses = None

    def buffers(self) -> tuple[Tensor, ...]:
        """Return the pages, uint8 (slots, bytes)."""
        return tuple(self._buffer(number, keep=True) for number in range(len(self._pages)))

    def slots(self) -> tuple[Tensor | None, ...]:
        """Return which slot of each page is whose: int64 (batch,), or None where all are in order."""
        return tuple(self._slots)

    def addresses(self) -> Tensor:
        """Return how far each sequence's slot of each page is from the first page: int64 (pages, batch), on the device.

        In units of 16 bytes. It is a tensor of its own for as long as no page is added.
        """
        if self._addresses is None:
            buffers = self.buffers()
            far = [(buffer.data_ptr() - buffers[0].data_ptr()) // ALIGNED for buffer in buffers]
            near = torch.tensor(far, dtype=torch.int64).to(self.device, non_blocking=True)
            order = torch.arange(self.batch, device=self.device)
            slots = torch.stack([order if one is None else one for one in self._slots])
            self._addresses = (near[:, None] + slots * (self._size // ALIGNED)).contiguous()
        return self._addresses

    def _lying_part(self, name: str, low: int, high: int) -> Tensor:
        """Return blocks of one page as they lie: (blocks, batch, *stored shape)."""
        page, first = divmod(low, self.blocks)
        held, slots = self._whole(name, self._buffer(page))[:, first : first + high - low], self._slots[page]
        return (held if slots is None else held.index_select(0, slots)).transpose(0, 1)

    def _buffer(self, number: int, *, keep: bool = False) -> Tensor:
        """Return a page on the device; brought for this once, or to stay for a while."""
        page = self._pages[number]
        if page.near is not None:
            return page.near
        near = self._brought.get(number)
        if near is None:
            assert page.far is not None
            near = page.far.to(self.device, non_blocking=True)
            if keep:
                self._brought[number] = near
        return near

    def _whole(self, name: str, buffer: Tensor) -> Tensor:
        """Return all that a page has of a tensor: a view (slots, blocks, *stored shape)."""
        spec, start = self.specs[name], self.starts[name]
        shape = (self.blocks, *spec.stored_shape)
        nbytes = math.prod(shape) * spec.dtype.itemsize
        return buffer[:, start : start + nbytes].view(spec.dtype).unflatten(1, shape)

    def _own(self, number: int) -> None:
        """Let a page be written to: on the device, the stream's own, slots in order."""
        page, slots = self._pages[number], self._slots[number]
        if page.near is not None and len(page.users) == 1 and slots is None:
            return
        held = self._buffer(number)
        own = self._new()
        own.copy_(held if slots is None else held.index_select(0, slots))
        page.users.discard(self)
        self._pages[number], self._slots[number] = Page(own), None
        self._pages[number].users.add(self)
        self._brought.pop(number, None)
        self._addresses = None

    def _add(self, buffer: Tensor) -> None:
        self._share(Page(buffer), None)

    def _share(self, page: Page, slots: Tensor | None) -> None:
        page.users.add(self)
        self._pages.append(page)
        self._slots.append(slots)
        self._addresses = None

    def _forget(self, low: int, high: int) -> None:
        """Forget pages `low` to `high`."""
        for page in self._pages[low:high]:
            page.users.discard(self)
        del self._pages[low:high], self._slots[low:high]
        if high > low:
            self._brought = {number - (high - low) * (number >= high): near for number, near in self._brought.items()
                             if not low <= number < high}
        self._addresses = None

    def _new(self) -> Tensor:
        try:
            return torch.zeros(self.batch, self._size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{self.device} has no room for a page of {self.page_nbytes:,} bytes: "
                                         f"{self.blocks} blocks of {self.batch} sequences; the {self.count} blocks "
                                         "held are as they were") from error


__all__ = ["Page", "Pages"]
