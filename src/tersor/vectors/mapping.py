"""Files that codes are mapped from: whether they are still whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from tersor.errors import CorruptStoreError


@dataclasses.dataclass(frozen=True)
class MappedFiles:
    """Files as they were when they were mapped.

    Attributes
    ----------
    files : tuple
        Path, inode and bytes of each.
    """

    files: tuple[tuple[Path, int, int], ...]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Self:
        """Return files as they are now."""
        return cls(tuple((path, path.stat().st_ino, path.stat().st_size) for path in paths))

    def check(self) -> None:
        """Raise where a file has become shorter: whoever reads a page that is no longer there is killed by the system.

        A file that was removed, or replaced by another, stays as it was for those who have mapped it.

        Raises
        ------
        CorruptStoreError
            If a file has fewer bytes than when it was mapped.
        """
        for path, inode, size in self.files:
            try:
                now = path.stat()
            except FileNotFoundError:
                continue
            if now.st_ino == inode and now.st_size < size:
                raise CorruptStoreError(f"{path}: it has {now.st_size} bytes, and had {size} when it was mapped; "
                                        "restore the file, or load the index from another")
