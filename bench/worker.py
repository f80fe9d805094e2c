"""Runs of the GPU suites: cases one by one in a worker process, so that a crash costs one case and not the run.

A suite is a module with `setup(options)` (once a worker) and `run(case, emit)`, which hands every result to `emit` as
soon as there is one. The parent writes each line to `OUT/<file>.jsonl` at once, and starts a new worker when one dies,
hangs, or has failed a case: after an error the state of CUDA is not to be trusted. Without CUDA the suites run too, on
tiny shapes, timed by a clock: a rehearsal, no result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import json
import logging
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common

SEED = 0
MARK = "@@"  # begins a line of the worker that is meant for the parent
GRAPH_SECONDS = 3e-3  # least length of a graph, so that gaps between replays do not count
GRAPH_CALLS = 2048
REPLAYS = 20  # at least
QUIET = frozenset({"us_least", "us_most", "moved", "sets", "error_poisoned", "dtype", "dtype_out", "bits"})
TIMED_SECONDS = 0.15  # of replays, or eager passes
Case = dict[str, Any]
Emit = Callable[[str, Mapping[str, Any], int, Mapping[str, Any]], None]


class SkipError(Exception):
    """A case that cannot be run here, for a reason that is not an error."""


class SetupError(Exception):
    """What a case needs cannot be made: trying again in another way is of no use."""


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
        with contextlib.suppress(ImportError, AttributeError):
            from tersor.ops import dispatch

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


# the parent -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A run of one suite.

    Attributes
    ----------
    suite : str
        Name of the module.
    out : Path
        Folder of `<file>.jsonl` and `<file>.failed.txt`, both appended to.
    file : str
    options : dict
        For the suite's `setup`.
    limit : float
        Seconds after which no further case is begun.
    patience : float
        Seconds without a word after which a worker is given up.
    finish : callable or None
        Gets every result line, in order, before it is written; may add numbers.
    retry : callable or None
        Gets a failed case and its traceback; returns one to be run in its place, or None.
    """

    suite: str
    out: Path
    file: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: float = 540.0
    patience: float = 150.0
    finish: Callable[[dict[str, Any]], None] | None = None
    retry: Callable[[Case, str], Case | None] | None = None

    def cases(self, cases: Sequence[Case]) -> int:
        """Run the cases; return the number that failed or were left out."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.began, self.missed = time.monotonic(), 0
        worker: _Worker | None = None
        waiting = list(cases)
        while waiting:
            case = waiting.pop(0)
            if time.monotonic() - self.began > self.limit:
                print(f"LEFT OUT, {self.limit:.0f} s are over: {[one['name'] for one in (case, *waiting)]}", flush=True)
                self.missed += 1 + len(waiting)
                break
            worker = worker or _Worker(self.suite, self.options)
            problem = worker.run(case, self._line, self.patience)
            if problem and problem.startswith("skipped"):
                print(f"{case['name']}: {problem}", flush=True)
            elif problem:
                worker.stop(patience=0.0 if problem.endswith("given up") else 15.0)
                worker = None
                self._failed(case, problem)
                again = self.retry(case, problem) if self.retry else None
                waiting = ([again] if again else []) + waiting
                self.missed += 0 if again else 1
        if worker:
            worker.stop()
        print(f"{self.suite}: {len(cases)} cases, {self.missed} failed or left out, "
              f"{time.monotonic() - self.began:.0f} s", flush=True)
        return self.missed

    def _line(self, line: dict[str, Any]) -> None:
        if self.finish:
            self.finish(line)
        with (self.out / f"{self.file}.jsonl").open("a") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        told = {name: value for name, value in line["numbers"].items() if name not in QUIET}
        shown = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                 for name, value in told.items() if not isinstance(value, (list, dict))]
        print(f"{time.monotonic() - self.began:4.0f} s {line['key']}: {', '.join(shown)}", flush=True)

    def _failed(self, case: Case, problem: str) -> None:
        text = f"FAILED {json.dumps(case)}\n{problem}\n"
        print(text, flush=True)
        with (self.out / f"{self.file}.failed.txt").open("a") as handle:
            handle.write(text)


class _Worker:
    """A process that runs cases, one at a time."""

    def __init__(self, suite: str, options: Mapping[str, Any]) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), suite, json.dumps(options)], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
        self.heard: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.heard.put(text.rstrip("\n"))
        self.heard.put(None)

    def run(self, case: Case, result: Callable[[dict[str, Any]], None], patience: float) -> str:
        """Run a case; return what went wrong, or nothing."""
        assert self.process.stdin is not None
        last: list[str] = []
        try:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it died; the queue says so
        while True:
            try:
                text = self.heard.get(timeout=case.get("patience", patience))
            except queue.Empty:
                return "\n".join([*last[-40:], f"nothing heard for {case.get('patience', patience):.0f} s; given up"])
            if text is None:
                return "\n".join([*last[-40:], f"the worker ended with status {self.process.wait()}"])
            if not text.startswith(MARK):
                print(text, flush=True)
                last.append(text)
                continue
            kind, _, rest = text.removeprefix(MARK).partition(" ")
            if kind == "result":
                result(json.loads(rest))
            elif kind == "done":
                return ""
            else:
                return json.loads(rest)

    def stop(self, patience: float = 15.0) -> None:
        """End the process; after some seconds by force."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=15)


# the worker -----------------------------------------------------------------------------------------------------------


def _say(kind: str, value: Any) -> None:
    print(f"{MARK}{kind} {json.dumps(value)}", flush=True)


def _emitter(suite: str) -> Emit:
    machine = common.machine()
    if torch.cuda.is_available():
        machine["cpu"] = torch.cuda.get_device_name()
    fixed = {"commit": os.environ.get("TERSOR_COMMIT") or common.commit(), "machine": common.rounded(machine),
             "versions": common.versions(), "seed": SEED}

    def emit(key: str, case: Mapping[str, Any], nbytes: int, numbers: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        _say("result", {"suite": suite, "key": key, "case": dict(case), "date": now, "bytes": nbytes, **fixed,
                        "numbers": common.rounded(numbers)})

    return emit


def _work(suite: str, options: dict[str, Any]) -> None:
    module = importlib.import_module(suite)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    module.setup(options)
    emit = _emitter(options.get("lines", "gpu"))
    for text in sys.stdin:
        try:
            with torch.no_grad():
                module.run(json.loads(text), emit)
        except SkipError as why:
            _say("skipped", f"skipped: {why}")
        except BaseException:  # noqa: BLE001 - one case must not end the run; the parent replaces this process
            _say("failed", traceback.format_exc()[-6000:])
            return
        else:
            _say("done", 0)


if __name__ == "__main__":
    import gpu_run  # the suites' own, rather than this second copy called __main__

    gpu_run._work(sys.argv[1], json.loads(sys.argv[2]))
