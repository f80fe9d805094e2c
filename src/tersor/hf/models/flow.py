"""Text on its way through a streamed model: what every batch carries from block to block, and moments of inputs.

Batches are worked on by several threads, each with one thread of torch, and their results are taken in the order of
the batches: so sums have the same bits however many threads there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tersor.hf.models.streamed import Given, Leaves, Streamed
from tersor.numerics.settings import pinned, threads_allowed
from tersor.planning.calibration import ChangeSum, MomentSum

HELD = 1 << 30  # bytes of activations that are held in memory; what is beyond lies in a file
MOMENTS = 1 << 31  # bytes of moments of single batches that may wait for those before them
T = TypeVar("T")


class Activations:
    """What left the last block of each list, by batch: on the device up to a limit, beyond it in mapped files.

    Parameters
    ----------
    folder : Path or None
        Where such files lie; None: everything stays on the device.
    limit : int
        Bytes.
    """

    def __init__(self, folder: Path | None = None, limit: int = HELD) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[tuple[int, str], Leaves] = {}
        self._used, self._lock = 0, threading.Lock()

    def of(self, batch: int) -> dict[str, Leaves]:
        """Return what a batch carries, by list."""
        return {name: leaves for (number, name), leaves in self._held.items() if number == batch}

    def put(self, batch: int, name: str, leaves: Leaves) -> None:
        """Keep a copy of what a batch's last block of a list returned, in the place of what was kept."""
        old = self._held.get((batch, name))
        if old is None or [leaf.shape for leaf in old] != [leaf.shape for leaf in leaves]:
            old = tuple(self._place(f"{name}.{batch}.{number}", leaf) for number, leaf in enumerate(leaves))
        for place, leaf in zip(old, leaves, strict=True):
            place.copy_(leaf)
        self._held[batch, name] = old

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is kept, by names for `restore`."""
        return {f"{batch}/{name}/{number}": leaf for (batch, name), leaves in self._held.items()
                for number, leaf in enumerate(leaves)}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Keep what `tensors` returned."""
        found: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
        for key, tensor in tensors.items():
            batch, name, number = key.split("/")
            found.setdefault((int(batch), name), []).append((int(number), tensor))
        for (batch, name), parts in found.items():
            self.put(batch, name, tuple(part.to(device) for _, part in sorted(parts, key=lambda part: part[0])))

    def _place(self, name: str, like: Tensor) -> Tensor:
        nbytes = like.numel() * like.element_size()
        with self._lock:
            held = self._folder is None or self._used + nbytes <= self._limit
            self._used += nbytes if held else 0
        if held or self._folder is None:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / name
        with file.open("wb") as handle:
            _allocate(handle.fileno(), nbytes)
        return torch.from_file(str(file), shared=True, size=like.numel(), dtype=like.dtype).reshape(like.shape)


def _allocate(handle: int, nbytes: int) -> None:
    """Take room on the disk: writing to a mapped file that finds none would end the process without a word."""
    written = 0
    block = bytes(min(nbytes, 1 << 24))
    while written < nbytes:
        written += os.write(handle, block[: nbytes - written])


class Flow:
    """Batches of token ids on their way through a model.

    Parameters
    ----------
    streamed : Streamed
    batches : sequence of Tensor
        Token ids (batch, length).
    kept : Activations
    """

    def __init__(self, streamed: Streamed, batches: Sequence[Tensor], kept: Activations) -> None:
        self.streamed, self.batches, self.kept = streamed, batches, kept

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(batch.numel() for batch in self.batches)

    def given(self, batch: int, device: torch.device | None = None) -> Given:
        """Return a copy of what a batch carries, on its own device or another: some blocks write into it."""
        device = device or self.streamed.at(batch).hollow.device
        return {name: tuple(leaf.to(device, copy=True) for leaf in leaves)
                for name, leaves in self.kept.of(batch).items()}

    def through(self, stage: int, *, watch: bool, keep: bool,
                step: Callable[[int], None] = lambda done: None) -> dict[str, Tensor]:
        """Run all batches through a stage that is resident.

        Parameters
        ----------
        watch : bool
            Whether to return `E[x xᵀ]` of what the stage's matrices multiply, by matrix; equal inputs, one tensor.
        keep : bool
            Whether batches carry on what the block returns.
        step : callable
            Called with the tokens that have passed so far, after each batch.
        """
        if not watch and stage == len(self.streamed.blocks):
            return {}
        with self.streamed.watched(stage) if watch else contextlib.nullcontext():
            return self._sums(stage, lambda batch: _moments(self._one(stage, batch, keep=keep)), step).means()

    def beside(self, dense: Flow, stage: int, *, keep: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run all batches through a stage that is resident here and in the dense model.

        Parameters
        ----------
        dense : Flow
            Of the same batches.
        keep : bool
            Whether batches of the dense model carry on what its block returns; here they never do.

        Returns
        -------
        (dict, dict)
            `E[y yᵀ]` of what the stage's matrices multiply here, and `E[(x - y) yᵀ]` where x is what they multiply in
            the dense model, by matrix; the latter where all tokens reach a matrix.
        """
        whole = self.streamed.watchable(stage)

        def work(batch: int) -> dict[str, Sums]:
            listed = dense._one(stage, batch, keep=keep)
            expected = dict(listed)
            once = len(listed) == len(whole) == len(expected)  # so the run need not go on behind the last matrix
            seen = self._one(stage, batch, keep=False, until=whole if once else None)
            return _moments(seen, {name: x for name, x in expected.items()
                                   if x.shape[:-1].numel() == self.batches[batch].numel()})

        with self.streamed.watched(stage), dense.streamed.watched(stage):
            total = self._sums(stage, work, lambda done: None)
        return total.means(), total.changes()

    def _one(self, stage: int, batch: int, *, keep: bool,
             until: Collection[str] | None = None) -> list[tuple[str, Tensor]]:
        with torch.no_grad():
            out, seen = self.streamed.at(batch).step(stage, self.batches[batch], self.given(batch), until)
            if keep and stage < len(self.streamed.blocks):
                self.kept.put(batch, self.streamed.blocks[stage].list, out)
            return seen

    def _sums(self, stage: int, work: Callable[[int], dict[str, Sums]], step: Callable[[int], None]) -> Moments:
        total, done = Moments(), 0
        devices, widest = self.streamed.devices, sum(m.shape[1] ** 2 for m in self.streamed.matrices(stage))
        for batch, found in enumerate(in_order(len(self.batches), work, devices=devices,
                                               room=room_for(devices, 4 * widest, MOMENTS))):
            total.add({name: sums.to(self.streamed.hollow.device) for name, sums in found.items()})
            done += self.batches[batch].numel()
            step(done)
        return total


@dataclasses.dataclass(eq=False)
class Sums:
    """Sums over what one tensor holds: the matrices that read it, and its moments."""

    names: list[str]
    moments: MomentSum
    change: ChangeSum | None = None

    def to(self, device: torch.device) -> Sums:
        """Return them on a device."""
        return Sums(self.names, self.moments.to(device), None if self.change is None else self.change.to(device))

    def merge(self, other: Sums) -> None:
        """Add those of another tensor."""
        self.moments.merge(other.moments)
        if self.change is not None and other.change is not None:
            self.change.merge(other.change)
        else:
            self.change = None


def _moments(seen: Sequence[tuple[str, Tensor]], expected: Mapping[str, Tensor] | None = None) -> dict[str, Sums]:
    """Return the sums of what was seen, each tensor once: the first matrix that read it, to all of them.

    Parameters
    ----------
    expected : mapping of str to Tensor or None
        What the same matrices multiply in the dense model.
    """
    found: dict[str, Sums] = {}
    inputs: list[tuple[Tensor, str]] = []
    for name, y in seen:
        first = next((leader for tensor, leader in inputs if tensor is y), None)
        if first is not None:
            found[first].names.append(name)
            continue
        inputs.append((y, name))
        rows, x = y.detach().reshape(-1, y.shape[-1]), (expected or {}).get(name)
        sums = Sums([name], MomentSum(y.shape[-1], y.device))
        sums.moments.add(rows)
        if x is not None and x.shape == y.shape:
            sums.change = ChangeSum(x.detach().reshape(rows.shape), rows)
        if name in found:
            found[name].merge(sums)
        else:
            found[name] = sums
    return found


class Moments:
    """Sums of batches, added up; matrices that read one tensor when they were first seen share one sum."""

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._leader: dict[str, str] = {}

    def add(self, found: Mapping[str, Sums]) -> None:
        """Add those of one batch."""
        for first, sums in found.items():
            for name in sums.names:
                self._leader.setdefault(name, first)
            if self._leader[first] != first:
                continue
            if first in self._sums:
                self._sums[first].merge(sums)
            else:
                self._sums[first] = sums

    def means(self) -> dict[str, Tensor]:
        """Return the means of `x xᵀ` by matrix."""
        means = {first: sums.moments.mean(first) for first, sums in self._sums.items()}
        return {name: means[first] for name, first in self._leader.items() if first in means}

    def changes(self) -> dict[str, Tensor]:
        """Return the means of pairs by matrix."""
        means = {first: sums.change.mean() for first, sums in self._sums.items() if sums.change is not None}
        return {name: means[first] for name, first in self._leader.items() if first in means}


def in_order(count: int, work: Callable[[int], T], *, devices: Sequence[torch.device], room: int = 1 << 20,
             gradients: bool = False) -> Iterator[T]:
    """Yield `work(0)`, `work(1)`, …, several of them at once, each on one thread of torch.

    Parameters
    ----------
    devices : sequence of torch.device
        Taken in turn, so that each GPU works on one number at a time; processors, on as many as there are threads.
    room : int
        How many results may wait.
    gradients : bool
        Whether the work records gradients.
    """
    def alone(number: int) -> T:
        with pinned(gradients=gradients), torch.set_grad_enabled(gradients), current(devices[number % len(devices)]):
            return work(number)

    able = max(len(devices), threads_allowed()) if devices[0].type == "cpu" else len(devices)
    workers = min(count, able, max(1, room))
    if workers <= 1:
        yield from map(alone, range(count))
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tersor-batch") as pool:
        for number in range(count):
            waiting.append(pool.submit(alone, number))
            if len(waiting) >= workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def room_for(devices: Sequence[torch.device], held: int, limit: int) -> int:
    """Return how many results may wait that hold so many bytes each: in a processor's memory, or one on each GPU."""
    return max(1 if devices[0].type == "cpu" else len(devices), limit // max(1, held))


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Within, kernels go to a device; each thread has a current one of its own."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # a thread that begins with a product has no context, of which torch warns
        yield
