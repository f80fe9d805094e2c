"""Who does the work on single matrices: a device, or several of one kind, each with a thread that works on it.

What a task computes depends on its arguments alone, and nothing is summed over tasks: so results have the same bits
whoever does them, and in whatever order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from tersor.hf.models.flow import current
from tersor.numerics.remembered import Memory, remembering
from tersor.numerics.settings import threads_allowed

TOGETHER = 1 << 24  # elements of tasks that one processor works on at once
LANES = 3  # tasks that one GPU works on at once, where it has room
TAKEN = 24  # bytes that an element of a task, or of what it needs, takes while it is worked on, about
BESIDE = 2  # times what tasks at once take that must be free


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Work on a matrix that a device of its own may do.

    Attributes
    ----------
    name : str
        Of the matrix.
    work : callable
        A function of a module; takes what `ready` returns, then `needs`.
    ready : callable
        Called when a device is free for the task: what it reads is in memory from then on.
    cost : int
        Of tasks, the longest is begun first: the elements to be encoded.
    needs : tuple of Tensor or None
        What several tasks need; brought to each device once.
    """

    name: str
    work: Callable[..., Any]
    ready: Callable[[], tuple[Any, ...]]
    cost: int
    needs: tuple[Tensor | None, ...] = ()

    @property
    def size(self) -> int:
        """Elements of what the task works on, and of what it needs."""
        return self.cost + sum(tensor.numel() for tensor in self.needs if tensor is not None)


class Crew(Protocol):
    """Does tasks, within a context.

    Attributes
    ----------
    devices : tuple of torch.device
        What this process works on; matrices are read to the first.
    """

    devices: tuple[torch.device, ...]

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield tasks with their results, as they are done; the first error ends all."""
        ...


class Hands:
    """Devices of this process.

    Parameters
    ----------
    devices : sequence of torch.device
        One may be named several times: several tasks are then done on it at once. So it is on one processor, too, where
        torch may use several threads and tasks are small: most of an encoder's steps take one thread only. And on one
        GPU that has room: most of an encoder's launches leave the greater part of it idle.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._streams: list[torch.cuda.Stream] = []  # of a GPU that does several tasks at once

    def _places(self, tasks: Sequence[Task]) -> tuple[torch.device, ...]:
        """Return the device of each task that is done at once."""
        if [device.type for device in self.devices] != ["cpu"]:
            return self.devices
        largest = max((task.size for task in tasks), default=1)
        return self.devices * max(1, min(threads_allowed(), TOGETHER // max(1, largest)))

    def _lanes(self, groups: Sequence[Sequence[Task]]) -> int:
        """Return how many groups are worked on at once on one GPU."""
        if [device.type for device in self.devices] != ["cuda"]:
            return 1
        free = torch.cuda.mem_get_info(self.devices[0])[0]
        free += torch.cuda.memory_reserved(self.devices[0]) - torch.cuda.memory_allocated(self.devices[0])
        sizes = sorted((max(task.size for task in group) for group in groups), reverse=True)
        return next((lanes for lanes in range(min(LANES, len(groups)), 1, -1)
                     if BESIDE * TAKEN * sum(sizes[:lanes]) <= free), 1)

    def _held(self, places: Sequence[torch.device], shared: Collection[int], *, apart: bool) -> list[_Held]:
        """Return what each place holds; `apart`: with a stream of its own, which stays that of the place."""
        if apart and places[0].type == "cuda":
            self._streams += [torch.cuda.Stream(places[0]) for _ in range(len(places) - len(self._streams))]
            return [_Held(device, shared, stream) for device, stream in zip(places, self._streams, strict=False)]
        return [_Held(device, shared) for device in places]

    def __enter__(self) -> Hands:
        """Return them."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield tasks with their results: in their order by one device, the longest first by several.

        Where one GPU works on several at once, those that need the same are done in turn, by one thread.
        """
        groups, shared = by_need(tasks), _shared(tasks)
        lanes = self._lanes(groups)
        places = self.devices * lanes if lanes > 1 else self._places(tasks)
        held = self._held(places, shared, apart=lanes > 1)
        if len(places) == 1:
            for task in tasks:
                yield task, held[0].work(task, task.ready())
            return
        waiting = groups if lanes > 1 else [[task] for task in longest_first(tasks)]
        own, free = [list[Task]() for _ in places], list(range(len(places)))
        running: dict[Future[Any], tuple[Task, int]] = {}
        with ThreadPoolExecutor(len(places), thread_name_prefix="tersor-hand") as pool:
            while True:
                for place in list(free):
                    if not own[place] and waiting:
                        own[place] = waiting.pop()
                    if own[place]:
                        task = own[place].pop(0)
                        free.remove(place)
                        running[pool.submit(held[place].work, task, task.ready())] = task, place
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    task, place = running.pop(done)
                    free.append(place)
                    yield task, done.result()


class _Held:
    """What a device holds for the tasks that it does."""

    def __init__(self, device: torch.device, shared: Collection[int], stream: torch.cuda.Stream | None = None) -> None:
        self._device, self._shared, self._stream = device, shared, stream
        self._moved: dict[int, Tensor] = {}  # by the original's id, which its task keeps alive
        self._memory = Memory()

    def work(self, task: Task, given: tuple[Any, ...]) -> Any:
        again = any(id(tensor) in self._shared for tensor in task.needs)
        if not again:  # nothing is kept that no other task asks for
            self._memory.clear()
        with _on(self._stream), remembering(self._memory) if again else contextlib.nullcontext():
            own = [value.to(self._device) if isinstance(value, Tensor) else value for value in given]
            return perform(task.work, [*own, *map(self._bring, task.needs)], self._device)

    def _bring(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = tensor.to(self._device)
        return self._moved[id(tensor)]


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Within, work goes to a stream: after what has been launched outside of streams, and done when the context ends.

    So whoever lets go of what it reads may do so: torch takes such memory for free at once.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.default_stream(stream.device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


def perform(work: Callable[..., Any], given: Sequence[Any], device: torch.device) -> Any:
    """Return what work makes of what it is given, on a device."""
    with torch.no_grad(), current(device):
        return work(*given)


def longest_first(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks with the longest last, where they are taken from; of equals, the first."""
    return sorted(reversed(tasks), key=lambda task: task.cost)


def by_need(tasks: Sequence[Task]) -> list[list[Task]]:
    """Return tasks in groups that need the same first of all, in their order; the longest group last, as above."""
    groups: dict[int, list[Task]] = {}
    for task in tasks:
        need = task.needs[0] if task.needs else None
        groups.setdefault(id(task if need is None else need), []).append(task)
    return sorted(reversed(groups.values()), key=lambda group: sum(task.cost for task in group))


def _shared(tasks: Sequence[Task]) -> set[int]:
    """Return the ids of tensors that several tasks need."""
    counts = Counter(id(tensor) for task in tasks for tensor in task.needs if tensor is not None)
    return {tensor for tensor, count in counts.items() if count > 1}
