"""Cases one by one in a process of their own, so that a crash costs one case and not the run.

A module that is measured so has a class for each kind of case, `setup()` (called once a process) and `run(case, emit)`,
which hands every result to `emit` as soon as there is one. The parent starts a new process when one dies, hangs, or has
failed a case: after an error the state of CUDA is not to be trusted. Without CUDA such modules run too, on tiny shapes,
timed by a clock: a rehearsal, no result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.places import ROOT
from bench.suite import Asked, Outcome, Result, Unmeasured

MARK = "@@"  # begins a line of the worker that is meant for the parent
SERVE = "import sys; from bench import worker; worker.serve(sys.argv[1])"
TOLD = 80  # lines of a worker that a failure is told by
Emit = Callable[[str, Mapping[str, Any], int, Mapping[str, Any]], None]


class SkipError(Exception):
    """A case that cannot be run here, for a reason that is not an error."""


class SetupError(Exception):
    """What a case needs cannot be made: trying again in another way is of no use."""


def listed(case: Any, **others: Any) -> dict[str, Any]:
    """Return a case's fields for a result line, with its name, its kind (`what`), and others."""
    return {"name": case.key, "what": case.what, **dataclasses.asdict(case), **others}


# the parent -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A run of one module's cases.

    Attributes
    ----------
    module : str
    asked : Asked
        Tracebacks go to `<last part of module>.failed.txt` in its folder, where there is one.
    limit : float
        Seconds after which no further case is begun.
    patience : float
        Seconds without a word after which a worker is given up.
    finish : callable or None
        Gets every result, in order; may add numbers.
    retry : callable or None
        Gets a failed case and its traceback; returns one to be run in its place, or None.
    """

    module: str
    asked: Asked
    limit: float = 540.0
    patience: float = 150.0
    finish: Callable[[Result], None] | None = None
    retry: Callable[[Any, str], Any | None] | None = None

    def outcomes(self, cases: Sequence[Any]) -> Iterator[Outcome]:
        """Run the cases; yield results as they come."""
        began, waiting = time.monotonic(), list(cases)
        worker: _Worker | None = None
        while waiting:
            case = waiting.pop(0)
            if time.monotonic() - began > self.limit:
                yield from (Unmeasured(one.key, f"{self.limit:.0f} s are over", failed=True)
                            for one in (case, *waiting))
                break
            worker = worker or _Worker(self.module)
            ended = yield from self._results(worker, case)
            if ended.why and not ended.failed:
                yield ended
            elif ended.failed:
                worker.stop(patience=0.0 if ended.why.endswith("given up") else 15.0)
                worker = None
                self._keep(case, ended.why)
                again = self.retry(case, ended.why) if self.retry else None
                waiting = ([again] if again else []) + waiting
                if not again:
                    yield Unmeasured(case.key, ended.why.splitlines()[-1], failed=True)
        if worker:
            worker.stop()

    def _results(self, worker: _Worker, case: Any) -> Iterator[Outcome]:
        """Yield the results of a case; return how it ended."""
        heard = worker.run(case, self.patience)
        while True:
            try:
                result = next(heard)
            except StopIteration as end:
                return end.value
            if self.finish:
                self.finish(result)
            yield result

    def _keep(self, case: Any, problem: str) -> None:
        if self.asked.out is None:
            return
        self.asked.out.mkdir(parents=True, exist_ok=True)
        with (self.asked.out / f"{self.module.rpartition('.')[2]}.failed.txt").open("a") as handle:
            handle.write(f"FAILED {case}\n{problem}\n")


class _Worker:
    """A process that runs cases, one at a time."""

    def __init__(self, module: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-u", "-c", SERVE, module], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        errors="replace")
        self.heard: queue.Queue[str | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.heard.put(text.rstrip("\n"))
        self.process.stdout.close()
        self.heard.put(None)

    def run(self, case: Any, patience: float) -> Iterator[Result]:
        """Run a case; yield its results, and return how it ended: with why, if there is something to tell."""
        assert self.process.stdin is not None
        last: list[str] = []
        told = json.dumps({"kind": type(case).__name__, "fields": dataclasses.asdict(case)})
        with contextlib.suppress(OSError):  # it died; the queue says so
            self.process.stdin.write(told + "\n")
            self.process.stdin.flush()
        while True:
            try:
                text = self.heard.get(timeout=patience)
            except queue.Empty:
                why = "\n".join([*last[-TOLD:], f"nothing heard for {patience:.0f} s; given up"])
                return Unmeasured(case.key, why, failed=True)
            if text is None:
                why = "\n".join([*last[-TOLD:], f"the worker ended with status {self.process.wait()}"])
                return Unmeasured(case.key, why, failed=True)
            if not text.startswith(MARK):
                print(f"    {text}", flush=True)
                last.append(text)
                continue
            kind, _, rest = text.removeprefix(MARK).partition(" ")
            if kind != "result":
                return Unmeasured(case.key, json.loads(rest))
            yield Result(**json.loads(rest))

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
        self.listener.join(timeout=15)


# the worker -----------------------------------------------------------------------------------------------------------


def _say(kind: str, value: Any) -> None:
    print(f"{MARK}{kind} {json.dumps(value)}", flush=True)


def _emit(key: str, case: Mapping[str, Any], nbytes: int, numbers: Mapping[str, Any]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    _say("result", {"key": key, "case": dict(case), "nbytes": nbytes, "numbers": dict(numbers), "device": device})


def serve(name: str) -> None:
    """Be the worker: run the cases that stdin tells; an error ends the process, and its traceback tells the parent."""
    module = importlib.import_module(name)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    module.setup()
    for text in sys.stdin:
        told = json.loads(text)
        fields = {name: _tuples(value) for name, value in told["fields"].items()}
        try:
            with torch.no_grad():
                module.run(getattr(module, told["kind"])(**fields), _emit)
        except SkipError as why:
            _say("skipped", str(why))
        else:
            _say("done", "")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
