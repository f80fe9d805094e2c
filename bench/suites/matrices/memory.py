"""Print this process's peak resident bytes: after importing torch alone, or after encoding one Gaussian matrix.

speed.py runs `report` in a process of its own.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def encode(method: str, rows: int, columns: int) -> None:
    """Make a matrix in place, so that making it costs no more than holding it, and encode it."""
    import tersor

    matrix = torch.empty(rows, columns).normal_(generator=torch.Generator().manual_seed(0))
    tersor.parse(method).encode(matrix)


def peak_bytes() -> int:
    """Return the peak resident bytes of this process alone.

    Linux keeps `ru_maxrss` across exec, so that it holds the parent's peak too; VmHWM starts anew.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(arguments: Sequence[str]) -> None:
    """Encode if a codec, rows and columns are given, then print the peak."""
    torch.set_num_threads(2)
    if arguments:
        encode(arguments[0], int(arguments[1]), int(arguments[2]))
    print(peak_bytes())
