"""Print this process's peak resident bytes: after importing torch alone, or after encoding one Gaussian matrix.

Run by speed.py: `memory.py` or `memory.py CODEC ROWS COLUMNS`.
"""

from __future__ import annotations

import resource
import sys
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


def main() -> None:
    """Encode if asked to, then print the peak."""
    torch.set_num_threads(2)
    if len(sys.argv) == 4:
        encode(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(peak_bytes())


if __name__ == "__main__":
    main()
