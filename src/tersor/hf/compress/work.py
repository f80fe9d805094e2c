"""The work folder of a run, `OUT.work`: claimed, stamped, kept for the next run or emptied, and finished."""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
from pathlib import Path

from tersor.errors import CorruptStoreError
from tersor.files import finished_name, read_sealed_json, tell_damaged, write_sealed_json

NAMES = ("staged", "fingerprint", "status.json", "sensitivities.json", "sensitivities.json.part", "survey.jsonl",
         "survey.jsonl.part", "survey.jsonl.outside", "plan.json", "encode.part", "activations", "matrices", "output",
         "blocks", "ranks.json", "gradients.safetensors", "recover.part", "recovered", "moved", "sides",
         "written")
FORMER = ("calibration.safetensors", "calibration.safetensors.moments", "calibration.safetensors.fisher")


class WorkFolder:
    """Where the stages of one output keep their files, beside it.

    Its methods are for who holds the lock on the output (`tersor.files.locked`). All that a run reads of it after a
    kill carries a digest: what is not as written is made again, and a warning says so.

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
        """Return the place of one of `NAMES`; earlier versions left those of `FORMER`, which are removed."""
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
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is where this run would keep its files, but is a file; move it, or "
                                  "name another output")
        strange = sorted(name for name in found if finished_name(name) not in (*NAMES, *FORMER))
        if strange:
            raise FileExistsError(f"{self.path} is where this run would keep its files, but holds others "
                                  f"({', '.join(strange[:3])}); move them, or name another output")
        return self

    def stamp(self, mark: str, *, resume: bool) -> None:
        """Make the folder; keep what a run of the same mark has finished, if it may be resumed, else empty it.

        A staged source is kept: opening the source wrote it just now.
        """
        file = self / "fingerprint"
        same = resume and _read(file) == mark
        self.path.mkdir(parents=True, exist_ok=True)
        for child in list(self.path.iterdir()):  # `claim` has made sure that these are ours
            kept = same and child.name in NAMES and child.name != "output"
            if child.name != "staged" and not kept:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        write_sealed_json(file, mark)

    def finish(self, *spent: str) -> None:
        """Put the finished output in its place and remove what is spent; the whole folder if that is all there is.

        Parameters
        ----------
        spent : str
            Names of files and folders; none: all there is.
        """
        (self / "output").rename(self.target)
        self.clear(*spent)

    def clear(self, *spent: str) -> None:
        """Remove files and folders by name (none: all there is), and the work folder itself if nothing is left."""
        for place in [self / name for name in spent] or [self.path]:
            if place.is_file():
                place.unlink()
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty, or gone
            self.path.rmdir()


def _read(file: Path) -> str | None:
    """Return the mark of the run that a work folder is of; None without one, or where it is not as written."""
    if not file.exists():
        return None
    try:
        return read_sealed_json(file)
    except CorruptStoreError as error:
        tell_damaged(error)
        return None


def peak_memory() -> int:
    """Return this process's largest resident size so far, in bytes."""
    status = Path("/proc/self/status")  # VmHWM starts anew with the program; ru_maxrss remembers the parent's
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory() -> int:
    """Return this process's resident size now, in bytes; the largest so far where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
