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
        What several tasks need; brought to each device once. What is `remembered` of it serves those that follow one
        another on a device.
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
        torch may use several threads and tasks are small: most of an encoder's steps take one thread only.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)

    def _places(self, tasks: Sequence[Task]) -> tuple[torch.device, ...]:
        """Return the device of each task that is done at once."""
        if [device.type for device in self.devices] != ["cpu"]:
            return self.devices
        largest = max((task.size for task in tasks), default=1)
        return self.devices * max(1, min(threads_allowed(), TOGETHER // max(1, largest)))

    def __enter__(self) -> Hands:
        """Return them."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield tasks with their results: in their order by one device, the longest first by several."""
        shared = _shared(tasks)
        held = [_Held(device, shared) for device in self._places(tasks)]
        if len(held) == 1:
            for task in tasks:
                yield task, held[0].work(task, task.ready())
            return
        waiting, free = longest_first(tasks), list(range(len(held)))
        running: dict[Future[Any], tuple[Task, int]] = {}
        with ThreadPoolExecutor(len(free), thread_name_prefix="tersor-hand") as pool:
            while waiting or running:
                while waiting and free:
                    task, place = waiting.pop(), free.pop()
                    running[pool.submit(held[place].work, task, task.ready())] = task, place
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    task, place = running.pop(done)
                    free.append(place)
                    yield task, done.result()


class _Held:
    """What a device holds for the tasks that it does."""

    def __init__(self, device: torch.device, shared: Collection[int]) -> None:
        self._device, self._shared = device, shared
        self._moved: dict[int, Tensor] = {}  # by the original's id, which its task keeps alive
        self._memory = Memory()

    def work(self, task: Task, given: tuple[Any, ...]) -> Any:
        again = any(id(tensor) in self._shared for tensor in task.needs)
        if not again:  # nothing is kept that no other task asks for
            self._memory.clear()
        with remembering(self._memory) if again else contextlib.nullcontext():
            own = [value.to(self._device) if isinstance(value, Tensor) else value for value in given]
            return perform(task.work, [*own, *map(self._bring, task.needs)], self._device)

    def _bring(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = tensor.to(self._device)
        return self._moved[id(tensor)]


def perform(work: Callable[..., Any], given: Sequence[Any], device: torch.device) -> Any:
    """Return what work makes of what it is given, on a device."""
    with torch.no_grad(), current(device):
        return work(*given)


def longest_first(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks with the longest last, where they are taken from; of equals, the first."""
    return sorted(reversed(tasks), key=lambda task: task.cost)


def _shared(tasks: Sequence[Task]) -> set[int]:
    """Return the ids of tensors that several tasks need."""
    counts = Counter(id(tensor) for task in tasks for tensor in task.needs if tensor is not None)
    return {tensor for tensor, count in counts.items() if count > 1}
