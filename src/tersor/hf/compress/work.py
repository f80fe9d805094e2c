"""The work folder of a run, `OUT.work`: claimed, stamped, kept for the next run or emptied, and finished."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path

from tersor.files import finished_name

NAMES = ("staged", "fingerprint", "calibration.safetensors", "survey.jsonl", "plan.json", "matrices", "output",
         "blocks", "ranks.json", "gradients.safetensors")


class WorkFolder:
    """Where the stages of one output keep their files, beside it.

    Parameters
    ----------
    output : Path
        What the run is to make; a directory that does not exist yet.

    Attributes
    ----------
    target, path : Path
        The output and its work folder, absolute.
    """

    def __init__(self, output: Path) -> None:
        self.target = output.resolve()
        self.path = self.target.with_name(f"{self.target.name}.work")

    def __truediv__(self, name: str) -> Path:
        """Return the place of one of `NAMES`."""
        return self.path / name

    def claim(self) -> WorkFolder:
        """Check that the output is not there yet, and that the folder is absent, empty, or an earlier run's.

        Raises
        ------
        FileExistsError
            If the output exists, or the folder holds somebody else's files.
        """
        if self.target.exists():
            raise FileExistsError(f"{self.target} exists; remove it or name another output")
        found = [child.name for child in self.path.iterdir()] if self.path.is_dir() else []
        strange = sorted(name for name in found if finished_name(name) not in NAMES)
        if strange or (self.path.exists() and not self.path.is_dir()):
            raise FileExistsError(f"{self.path} is where this run would keep its files, but holds others "
                                  f"({', '.join(strange[:3])}); move them, or name another output")
        return self

    def stamp(self, mark: str, *, resume: bool) -> None:
        """Make the folder; keep what a run of the same mark has finished, if it may be resumed, else empty it.

        A staged source is kept: opening the source wrote it just now.
        """
        file = self / "fingerprint"
        same = resume and file.is_file() and file.read_bytes() == mark.encode()
        self.path.mkdir(parents=True, exist_ok=True)
        for child in list(self.path.iterdir()):  # `claim` has made sure that these are ours
            kept = same and child.name in NAMES and child.name != "output"
            if child.name != "staged" and not kept:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        file.write_text(mark)

    def finish(self, *spent: str) -> None:
        """Put the finished output in its place and remove what is spent; the whole folder if nothing is named."""
        (self / "output").rename(self.target)
        for place in [self / name for name in spent] or [self.path]:
            shutil.rmtree(place, ignore_errors=True)


def peak_memory() -> int:
    """Return this process's largest resident size so far, in bytes."""
    status = Path("/proc/self/status")  # VmHWM starts anew with the program; ru_maxrss remembers the parent's
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
