"""Timing on a GPU, and what a time must stand behind: results compared, memory poisoned, plain torch noticed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.ops import dispatch

SEED = 0
GRAPH_SECONDS = 3e-3  # least length of a graph, so that gaps between replays do not count
GRAPH_CALLS = 2048
REPLAYS = 20  # at least
TIMED_SECONDS = 0.15  # of replays, or eager passes


def device() -> torch.device:
    """Return the GPU, or the processor in a rehearsal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds an operation: median over replays, the least, the greatest; and how they were taken."""

    seconds: float
    least: float
    most: float
    how: str  # "graph", "events" (launched one by one) or "clock"

    def numbers(self) -> dict[str, Any]:
        """Return them for a result line."""
        return {"us": 1e6 * self.seconds, "us_least": 1e6 * self.least, "us_most": 1e6 * self.most, "timed": self.how}


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Raise where torch waits for the device, which no graph can hold."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capturable(work: Callable[[], Any]) -> str:
    """Return why `work`, run before, cannot be captured; empty where nothing speaks against it."""
    settle()
    try:
        with no_sync():
            work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tersor" in frame.filename]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} '{frames[-1].line}'" if frames else ""
        return f"it waits for the device{where}"
    finally:
        settle()
    return ""


def capture(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return the graph of `work`, which is run before on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def time_calls(calls: Sequence[Callable[[], Any]], *, graph: bool = True) -> Timing:
    """Time operations, one a set of inputs, in turn: by replays of a graph where they can be captured."""
    if not torch.cuda.is_available():
        return _clocked(calls)

    def every(rounds: int = 1) -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    every()  # warm: compiles, tunes, fills caches of constants
    reason = capturable(every) if graph else "not asked for"
    if reason:
        print(f"    no graph: {reason}", flush=True)
        return _repeated(every, len(calls), "events")
    held = capture(every)
    once = _repeated(held.replay, 1, "graph", least=3).seconds
    rounds = max(1, min(math.ceil(GRAPH_SECONDS / once), GRAPH_CALLS // len(calls)))
    if rounds > 1:
        del held
        held = capture(lambda: every(rounds))
    return _repeated(held.replay, rounds * len(calls), "graph")


def _repeated(work: Callable[[], Any], operations: int, how: str, least: int = REPLAYS) -> Timing:
    """Time repetitions by events."""
    def once() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    first = min(once(), once())
    count = max(least, min(200, int(TIMED_SECONDS / first)))
    if how == "events":
        count = max(3, min(count, int(4 * TIMED_SECONDS / first)))
    times = [seconds / operations for seconds in (once() for _ in range(count))]
    return Timing(statistics.median(times), min(times), max(times), how)


def _clocked(calls: Sequence[Callable[[], Any]]) -> Timing:
    times = []
    for call in (*calls, *calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    times = times[len(calls) :]
    return Timing(statistics.median(times), min(times), max(times), "clock")


class PlainTorch(logging.Handler):
    """Collects why operations ran as plain torch though there is a kernel; they tell once, and are made to tell again.

    Use it around calls; `reasons` then holds what they said.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.reasons.append(record.getMessage())

    def __enter__(self) -> PlainTorch:
        dispatch.log_once.cache_clear()
        log = logging.getLogger("tersor.ops")
        log.setLevel(logging.INFO)
        log.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("tersor.ops").removeHandler(self)

    def numbers(self) -> dict[str, str]:
        """Return the reasons for a result line, nothing where there are none."""
        return {"plain": "; ".join(dict.fromkeys(self.reasons))} if self.reasons else {}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill all memory that torch allocates with NaN: what an operation does not write shows."""
    state = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return ‖found - wanted‖ / ‖wanted‖ in float64; infinity where a number is not finite."""
    wide = found.to(torch.float64)
    if not bool(torch.isfinite(wide).all()):
        return math.inf
    return float((wide - wanted.to(torch.float64)).norm() / wanted.to(torch.float64).norm())
