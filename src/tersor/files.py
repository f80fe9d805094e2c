"""One safetensors file: written whole or not at all, with ordinary permissions and ordinary errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors to `path`; it appears whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written, for example because the disk is full; names the file.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.touch()  # safetensors gives new files mode 600; this one has what the user's umask says
        mode = partial.stat().st_mode
        save_file(dict(tensors), partial, metadata={"format": "pt", **(metadata or {})})
        partial.chmod(mode)
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
