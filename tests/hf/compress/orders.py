"""What workers of a cluster are told to do; they import this, and start the sooner the less it imports."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from tersor.errors import BudgetError
from tersor.hf.compress import desk

PATIENCE = 120  # seconds


def killed(marks: str, deaths: dict[str, int], order: desk.Order, *given: Any) -> Any:
    """Encode to order, in a worker; it is killed as often as is said of a matrix.

    A last death of several, which ends the run, waits for those of the others: workers may be faster or slower.
    """
    name = order.name.rpartition("layers.0.")[2]
    mark = next((mark for mark in (Path(marks) / f"{name}.{n}" for n in range(deaths.get(name, 0)))
                 if not mark.exists()), None)
    if mark is not None:
        others = [Path(marks) / f"{other}.0" for other, count in deaths.items() if count < deaths[name]]
        ended = time.monotonic() + PATIENCE
        while mark.suffix == f".{deaths[name] - 1}" and not all(other.exists() for other in others):
            assert time.monotonic() < ended, f"{others} did not die"
            time.sleep(0.05)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return desk.encode_order(order, *given)


def refuse(words: str) -> None:
    raise BudgetError(words, 3)


def scaled(tensor: torch.Tensor, by: torch.Tensor | None, add: torch.Tensor) -> torch.Tensor:
    assert by is None
    tensor += add  # what is given is the task's own
    return tensor
