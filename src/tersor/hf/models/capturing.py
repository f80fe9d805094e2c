"""Capturing a step as a CUDA graph, and whether it can be: it must not wait for the device."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tersor.hf.models.stepping import DeclinedError

DEVICES = frozenset({"cuda"})
WAITS = "called a synchronizing CUDA operation"  # what torch warns of
PROTOTYPE = "Synchronization debug mode is a prototype"  # what it says when it is to warn


@contextlib.contextmanager
def waiting() -> Iterator[list[str]]:
    """Collect where this thread waits for a CUDA device within the block.

    A capture that fails leaves torch's generators and streams as they were within it, so none is tried that would.
    """
    found, own, mode = list[str](), threading.get_ident(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f"{WAITS}|{PROTOTYPE}")
        shown = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *others: Any, **named: Any) -> None:
            if not str(message).startswith((WAITS, PROTOTYPE)):
                shown(message, category, filename, lineno, *others, **named)
            elif threading.get_ident() == own and str(message).startswith(WAITS):
                found.append(f"{filename}:{lineno}")

        warnings.showwarning = show
        if mode == 0:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def try_out(step: Callable[[], Any]) -> None:
    """Do a step once before it is captured: all is compiled and loaded then.

    Raises
    ------
    DeclinedError
        If it waits for the device.
    """
    with waiting() as found:
        step()
    if found:
        raise DeclinedError(f"a step waits for the device at {found[0]}")


def capture(step: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the graph of a step that was tried out; it is not done.

    Raises
    ------
    DeclinedError
        If it cannot be captured.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:  # other threads may use the device meanwhile
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:  # of the driver's too: what is captured has not run
        torch.cuda.set_stream(before)
        raise DeclinedError(f"a step is not captured: {' '.join(str(error).split())[:200]}") from error
    return graph
