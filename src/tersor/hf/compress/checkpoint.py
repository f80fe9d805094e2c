"""What a killed job goes on from: sums and activations, in files beside the one that it is to write."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, tell_damaged

EVERY = 30.0  # seconds between two savings, at least
SHARE = 0.1  # of the time that savings may take: activations of large models are large


def part_of(file: Path) -> Path:
    """Return the file of what a killed job has done so far, beside the one that it is to write."""
    return file.with_name(f"{file.name}.part")


def checkpoints(file: Path) -> tuple[Path, Path]:
    """Return the files of the sensitivities and of the moments of a calibration that is to be written."""
    return file.with_name(f"{file.name}.fisher"), file.with_name(f"{file.name}.moments")


class Pace:
    """When it is time to save once more: what is saved takes room and time, and is only of use to a killed run."""

    def __init__(self) -> None:
        self._saved, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Return whether it is time."""
        return time.monotonic() - self._saved >= max(EVERY, self._cost / SHARE)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Take note of how long a saving takes."""
        began = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._cost = self._saved - began


class Checkpoint:
    """Partial sums of one part of a job, in a file.

    Parameters
    ----------
    path : Path
        Beside what the job is to write.
    mark : str
        A digest of all that the sums depend on; sums of other jobs are not taken.
    """

    def __init__(self, path: Path, mark: str) -> None:
        self.path, self._mark = path, mark
        self._pace = Pace()

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last, tensors mapped; None if nothing was, it is damaged, or another job's."""
        if not self.path.exists():
            return None
        try:
            tensors, record = load_sealed(self.path)
        except CorruptStoreError as error:
            tell_damaged(error)
            return None
        return (tensors, record) if record.get("job") == self._mark else None

    def due(self) -> bool:
        """Return whether it is time to save."""
        return self._pace.due()

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace what was saved; a kill leaves the old file or the new one."""
        with self._pace.saving():
            save_sealed(tensors, self.path, {"job": self._mark, **record})

    def drop(self) -> None:
        """Remove the file: what it was for is done."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
