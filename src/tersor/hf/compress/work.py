"""The work folder of a run: claimed, stamped, kept for the next run or emptied."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from tersor.files import finished_name

REPORT = "tersor-report.json"


WORK_NAMES = ("staged", "fingerprint", "calibration.safetensors", "survey.jsonl", "plan.json", "matrices", "output",
              "blocks", "ranks.json", "gradients.safetensors")


def work_folder(output: Path) -> Path:
    """Return where a run keeps its stages' files: `OUT.work`, beside the output."""
    return output.with_name(f"{output.name}.work")


def claim(work: Path) -> Path:
    """Return the work folder if it is free to use: absent, empty, or made by an earlier run.

    Raises
    ------
    FileExistsError
        If it holds somebody else's files.
    """
    found = [child.name for child in work.iterdir()] if work.is_dir() else []
    strange = sorted(name for name in found if finished_name(name) not in WORK_NAMES)
    if strange or (work.exists() and not work.is_dir()):
        raise FileExistsError(f"{work} is where this run would keep its files, but holds others "
                              f"({', '.join(strange[:3])}); move them, or name another output")
    return work


def peak_memory() -> int:
    """Return this process's largest resident size so far, in bytes."""
    status = Path("/proc/self/status")  # VmHWM starts anew with the program; ru_maxrss remembers the parent's
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
