"""Tasks on a Ray cluster: a local one, or one of several machines that see nothing of this one's files.

A task whose worker dies is done once more; if that dies too, the run ends, and goes on when it is started again. What
workers are given lies in Ray's object store, which is bounded, and beyond that on Ray's disk.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tersor
from tersor.errors import ModelError, WorkerError
from tersor.hf.compress.crew import Task, longest_first, perform

OBJECTS = 1 << 31  # bytes of the object store of a local cluster
AHEAD = 2  # tasks a worker that are given out: while one is done, what the next needs is on its way
RETRIES = 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Packed:
    """A tensor's bytes: what Ray maps into workers without copying."""

    array: Any
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, value: Any) -> Any:
        """Return a tensor packed, and anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        flat = value.detach().cpu().contiguous().reshape(-1)
        return cls(flat.view(torch.uint8).numpy(), value.dtype, value.shape)

    @staticmethod
    def opened(value: Any, device: torch.device) -> Any:
        """Return what was packed, in memory of its own."""
        if not isinstance(value, _Packed):
            return value
        return torch.from_numpy(value.array.copy()).view(value.dtype).reshape(value.shape).to(device)


def _remotely(expected: tuple[str, ...], kind: str, work: Any, given: Sequence[Any], *needs: Any) -> Any:
    """Do a task, in a worker."""
    found, device = _facts(kind), torch.device(kind)
    if found != expected:
        raise ModelError(f"a worker has {', '.join(found)}; expected {', '.join(expected)}, as here: bytes would "
                         "depend on who does what")
    own = [_Packed.opened(value, device) for value in (*given, *needs)]
    return perform(work, own, device)


def _facts(kind: str) -> tuple[str, ...]:
    """Return what bytes depend on besides a task."""
    gpu = (torch.cuda.get_device_name(),) if kind == "cuda" else ()
    return f"tersor {tersor.__version__}", f"torch {torch.__version__}", *gpu


class Cluster:
    """Workers of a Ray cluster; it ends with the context in which it was started.

    Parameters
    ----------
    devices : sequence of torch.device
        What this process works on. A local cluster has as many workers.
    address : str or None
        Of a cluster to join, as Ray names it: `"auto"`, `"host:6379"`; all of its workers are used. None: a local one
        is started, unless this process has joined one.

    Raises
    ------
    ModelError
        If Ray is not installed, or no cluster answers.
    """

    def __init__(self, devices: Sequence[torch.device], address: str | None = None) -> None:
        self._ray, self.devices = load(), tuple(devices)
        self._kind = devices[0].type
        gpus = [] if self._kind == "cpu" else sorted({device.index or 0 for device in devices})
        if address is None and gpus != list(range(len(gpus))):
            raise ModelError("--engine ray starts workers on the first GPUs; found "
                             f"{', '.join(f'cuda:{gpu}' for gpu in gpus)}")
        self._own = not self._ray.is_initialized()
        local = {"num_cpus": len(devices), "num_gpus": len(gpus), "object_store_memory": OBJECTS,
                 "include_dashboard": False, "_system_config": {"task_oom_retries": RETRIES}}
        if self._own:
            self._begin({"address": address} if address else local)
        there = self._ray.cluster_resources()
        share = len(gpus) / len(devices) if address is None else float(bool(gpus))
        slots = there.get("GPU", 0.0) / share if share else there.get("CPU", 0.0)
        self._room = AHEAD * max(1, int(slots))
        self._work = self._ray.remote(_remotely).options(num_cpus=1, num_gpus=share, max_retries=RETRIES)
        self._facts = _facts(self._kind)

    def _begin(self, how: dict[str, Any]) -> None:
        try:
            self._ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ModelError(f"--engine ray: no cluster: {' '.join(str(error).split())[:200]}") from error

    def __enter__(self) -> Cluster:
        """Return the cluster."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the cluster; end it, if it was started here."""
        if self._own:
            self._ray.shutdown()

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield tasks with their results, the longest first.

        Raises
        ------
        WorkerError
            If a task's worker has died twice.
        """
        waiting, running, shared = longest_first(tasks), dict[Any, Task](), dict[int, Any]()
        while waiting or running:
            while waiting and len(running) < self._room:
                task = waiting.pop()
                given = [_Packed.of(value) for value in task.ready()]
                needs = [self._shared(tensor, shared) for tensor in task.needs]
                running[self._work.remote(self._facts, self._kind, task.work, given, *needs)] = task
            for done in self._ray.wait(list(running), num_returns=1)[0]:
                task = running.pop(done)
                yield task, self._result(done, task)

    def _shared(self, tensor: Tensor | None, shared: dict[int, Any]) -> Any:
        """Return a tensor's place in the object store; it is put there once for all tasks, which keep it alive."""
        if tensor is None:
            return None
        if id(tensor) not in shared:
            shared[id(tensor)] = self._ray.put(_Packed.of(tensor))
        return shared[id(tensor)]

    def _result(self, reference: Any, task: Task) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.RayError as error:
            raise WorkerError(f"'{task.name}': the worker died, and so did the one that was to do it again "
                              f"({type(error).__name__}); what is finished is kept, run again to go on") from error


def check_engine(text: str) -> None:
    """Raise `ModelError` unless an engine is `ray` or `ray:ADDRESS`, and Ray is installed."""
    if text.partition(":")[0] != "ray" or text == "ray:":
        raise ModelError(f"--engine '{text}': expected ray, or ray:ADDRESS of a cluster to join")
    load()


def load() -> Any:
    """Return Ray.

    Raises
    ------
    ModelError
        If it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModelError("--engine ray needs the package ray; install tersor[ray]") from error
    return ray
