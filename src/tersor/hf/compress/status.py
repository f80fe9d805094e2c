"""How far a run is: told to who asked for it, and kept in its work folder for `tersor status`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tersor.errors import BusyError
from tersor.figures import Amount
from tersor.files import locked, read_json, write_json
from tersor.hf.compress.request import Progress
from tersor.hf.compress.work import WorkFolder, memory, peak_memory

STATUS = "status.json"
EVERY = 1.0  # seconds between two writings, at least
BY_BLOCKS = ("survey", "encode")


class Teller:
    """Progress of a run.

    Parameters
    ----------
    tell : Progress
        Who asked for it; gets an `Amount`.
    work : WorkFolder
    nbytes : int
        Of the original's weights.
    place : callable
        Returns which block is worked on, in words.
    """

    def __init__(self, tell: Progress, work: WorkFolder, nbytes: int, place: Callable[[], str]) -> None:
        self._tell, self._file, self._nbytes, self._place = tell, work / STATUS, nbytes, place
        self._began = self._stage_began = time.time()
        self._stage, self._written = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note of a stage's progress."""
        now, fresh = time.time(), stage != self._stage
        if fresh:
            self._stage, self._stage_began = stage, now
        share = done / total if total else 1.0
        place = self._place() if stage in BY_BLOCKS else ""
        amount = Amount(done, place, int(share * self._nbytes) if stage in BY_BLOCKS else 0, memory())
        if (fresh or now - self._written >= EVERY) and self._file.parent.is_dir():
            self._written = now
            write_json(self._file, {
                "process": os.getpid(), "host": socket.gethostname(), "stage": stage, "done": done, "total": total,
                "place": place, "bytes_done": amount.nbytes, "bytes_original": self._nbytes, "began": self._began,
                "stage_began": self._stage_began, "told": now, "memory_bytes": amount.memory,
                "peak_memory_bytes": peak_memory(), "device_memory_bytes": device_memory()})
        self._tell(stage, amount, total)


def device_memory() -> int:
    """Return the largest number of bytes that torch has held on GPUs so far."""
    if not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_reserved(number) for number in range(torch.cuda.device_count()))


def status(path: Path) -> dict[str, Any]:
    """Return how far the run of an output is; `path` is the output, or its work folder.

    Returns
    -------
    dict
        `state`: `"running"`, `"stopped"` (the same command goes on) or `"finished"`; and, where the run has said so:
        `stage`, `place`, `percent`, `seconds`, `seconds_of_stage`, `seconds_left_of_stage`, `bytes_per_second`,
        `memory_bytes`, `peak_memory_bytes`, `device_memory_bytes`, `matrices` (those that are encoded), `process`.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    """
    output = path.with_name(path.name.removesuffix(".work")) if path.name.endswith(".work") else path
    work = WorkFolder(output)
    if not work.path.is_dir() and not work.target.exists():
        raise FileNotFoundError(f"{work.path}: no such folder; expected the output of a run of 'tersor compress', or "
                                "its work folder, OUT.work")
    state = "finished" if work.target.exists() else "running" if _busy(work.target) else "stopped"
    found: dict[str, Any] = {"state": state}
    if state == "finished" or not (work / STATUS).is_file():
        return found
    try:
        return found | _figures(read_json(work / STATUS), work, running=state == "running")
    except (ValueError, LookupError, TypeError):  # damaged; the run itself never reads it
        return found


def _figures(told: dict[str, Any], work: WorkFolder, *, running: bool) -> dict[str, Any]:
    now = time.time() if running else told["told"]
    elapsed, share = max(0.0, now - told["stage_began"]), told["done"] / told["total"] if told["total"] else 1.0
    found = {"stage": told["stage"], "place": told["place"] or None, "percent": 100.0 * share,
             "seconds": now - told["began"], "seconds_of_stage": elapsed,
             "seconds_left_of_stage": elapsed * (1 - share) / share if running and 0 < share < 1 else None,
             "bytes_per_second": told["bytes_done"] / elapsed if told["bytes_done"] and elapsed else None,
             "memory_bytes": told["memory_bytes"] if running else None,
             "peak_memory_bytes": told["peak_memory_bytes"], "device_memory_bytes": told["device_memory_bytes"] or None,
             "matrices": len(list((work / "matrices").glob("*.safetensors"))),
             "process": f"{told['process']} on {told['host']}"}
    return {key: value for key, value in found.items() if value is not None}


def _busy(target: Path) -> bool:
    """Return whether somebody is writing an output."""
    try:
        with locked(target):
            return False
    except BusyError:
        return True
